"""The list of operations that servers run."""

import pytest
import torch

from genie.errors import UnsupportedOpError
from genie.wire.allowed_ops import ALLOWED_BASES, check, is_allowed

FORBIDDEN = """
    aten::from_file aten::from_file.out aten::set_ aten::set_.source_Storage aten::resize_ aten::record_stream
    aten::_assert_async aten::save aten::sym_size.int aten::_reshape_alias aten::_print aten::data prim::Print
    profiler::_record_function_enter os::system genie::anything c10d::send aten::_cufft_clear_plan_cache
    add.Tensor
"""
ALLOWED = """
    aten::add.Tensor aten::add_.Tensor aten::linear.default aten::scaled_dot_product_attention aten::zeros
    aten::index_put_ aten::view aten::_to_copy aten::convolution_backward aten::__and__.Tensor
    genie::manual_seed
"""


@pytest.mark.parametrize("op", FORBIDDEN.split())
def test_what_leaves_the_tensors_is_refused(op):
    assert not is_allowed(op)
    with pytest.raises(UnsupportedOpError, match="servers do not run"):
        check(op)


@pytest.mark.parametrize("op", ALLOWED.split())
def test_what_computes_on_tensors_is_allowed(op):
    check(op)


def test_every_name_is_an_op_of_some_torch():
    known = {
        n.partition("::")[2].partition(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("aten::")
    }
    # Names differ a little between the versions of torch that we support.
    assert len(ALLOWED_BASES - known) < 40, sorted(ALLOWED_BASES - known)


def test_nothing_takes_a_storage_a_stream_or_a_file():
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, base = schema.name.partition("::")
        if namespace == "aten" and base in ALLOWED_BASES:
            for argument in schema.arguments:
                assert "Storage" not in str(argument.type)
                assert "Stream" not in str(argument.type)
                assert argument.name != "filename"
