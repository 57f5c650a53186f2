"""Which cells are judged, and when none may be: missing, renamed, new, another machine, other work."""

import copy

import pytest

from genie.bench.gate.matching import match
from genie.errors import CannotCompareError
from tests.bench.gate.inputs import FINGERPRINT, cell, cell_id, result

LOCAL, FULL = cell_id("local_pytorch"), cell_id("genie_full")


def both():
    return result(cell("local_pytorch"), cell("genie_full"))


def test_the_same_cells_are_common():
    matched = match([both(), both()], [both(), both()])
    assert (matched.common, matched.missing, matched.added) == ((LOCAL, FULL), {}, ())


def test_a_vanished_cell_is_missing_and_a_new_one_is_told():
    matched = match([both()], [result(cell("local_pytorch"), cell("ray"))])
    assert matched.common == (LOCAL,)
    assert "removed or renamed, is skipped, or failed" in matched.missing[FULL]
    assert matched.added == (cell_id("ray"),)


def test_a_renamed_cell_is_missing_with_its_new_name():
    renamed = cell("genie_full") | {"fullname": "bench_tests/test_new.py::test_new[genie_full]"}
    matched = match([both()], [result(cell("local_pytorch"), renamed)])
    assert "renamed to bench_tests/test_new.py::test_new[genie_full]?" in matched.missing[FULL]


def test_a_cell_that_fails_in_some_new_processes_is_missing():
    matched = match([both()] * 3, [both(), result(cell("local_pytorch")), both()])
    assert "measured in 2 of 3 new runs" in matched.missing[FULL]


def test_a_cell_without_one_of_its_cases_is_missing():
    old = result(cell(workload="ops", cases={"matmul": 1.0, "norm": 1.0}))
    new = result(cell(workload="ops", cases={"matmul": 1.0}))
    assert match([old], [new]).missing == {cell_id(workload="ops"): "without 1 of its cases: norm"}
    assert not match([new], [old]).missing


def test_nothing_in_common_cannot_be_compared():
    with pytest.raises(CannotCompareError, match="no cell is in both"):
        match([result(cell("genie_full"))], [result(cell("ray"))])


def test_another_machine_is_named():
    other = copy.deepcopy(FINGERPRINT)
    other["client"]["cpu_model"] = "another CPU"
    other["devices"][0]["torch"] = "2.12.0"
    with pytest.raises(CannotCompareError) as error:
        match([both()], [result(cell("local_pytorch"), cell("genie_full", fingerprint=other))])
    assert "fingerprint.client.cpu_model: a CPU, not another CPU" in str(error.value)
    assert "torch: 2.13.0, not 2.12.0" in str(error.value)
    assert "store a new baseline" in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"profile": "cpu"}, "profile: smoke, not cpu"),
        ({"weights": {"source": "seeded", "sha256": "11"}}, "weights.sha256: 00, not 11"),
        ({"params": {"batch": 4}}, "params.batch: nothing, not 4"),
        ({"model": {"name": "a model", "params": 9, "dtype": "float32"}}, "model.params: 10, not 9"),
    ],
)
def test_other_work_is_named(change, told):
    with pytest.raises(CannotCompareError, match=told):
        match([result(cell())], [result(cell(**change))])


def test_a_process_of_one_side_on_another_machine_is_noticed():
    other = copy.deepcopy(FINGERPRINT)
    other["client"]["cores"] = [0]
    with pytest.raises(CannotCompareError, match="cores"):
        match(
            [both(), both()], [both(), result(cell("local_pytorch", fingerprint=other), cell("genie_full"))]
        )
