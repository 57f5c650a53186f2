"""A server to test against, and programs written by hand."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from genie.devices import device_slot
from genie.runtime.connection import Connection, fetched_tensors
from genie.runtime.server_process import ServerProcess
from genie.wire.messages import Execute, OpDef, TemplateBody, TensorSpec
from genie.wire.tensors import to_wire
from genie.wire.vectors import Vectors, whole

TOKEN = "a token for tests"
MEMORY_LIMIT = 64 << 20
DEVICE = os.environ.get("GENIE_TEST_DEVICE", "cpu")  # "cuda" runs these tests on a GPU
FACTORIES = ("aten::zeros", "aten::rand")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    """One server for all tests; a session may hold 64 MiB on it."""
    with ServerProcess.start(
        device_slot(DEVICE, 0),
        token=TOKEN,
        log_dir=tmp_path_factory.mktemp("server"),
        extra_args=["--memory-limit", str(MEMORY_LIMIT)],
    ) as process:
        yield process
        assert process.alive(), process.log_tail()


@pytest.fixture
def connection(server) -> Iterator[Connection]:
    with connect(server) as c:
        yield c


def connect(server: ServerProcess) -> Connection:
    return Connection.connect(server.address, TOKEN, log_tail=server.log_tail)


def vector(kind: str, *values: float) -> bytes:
    return struct.pack(f"<{len(values)}{kind}", *values)


def body(
    *calls: tuple, n_ext: int, kept: list[int], n_slots: int | None = None, first_tid: int = 0
) -> TemplateBody:
    """Each call is (op, argument patterns, tensor slots[, outs]); every one gets its own op number."""
    defs, code, made = [], [], 0
    for tid, (op, args, slots, *outs) in enumerate(calls, first_tid):
        outputs = outs[0] if outs else [-1]
        on_device = {"device": ["dev"]} if op in FACTORIES else {}
        defs.append(OpDef(tid, op, args, on_device, outputs))
        code += [tid, *slots]
        made += outputs.count(-1)
    return TemplateBody(
        defs, vector("i", *code), n_ext, made if n_slots is None else n_slots, vector("i", *kept)
    )


ADD = ("aten::add.Tensor", [["t"], ["t"]], [-1, -1])
DOUBLE = body(ADD, n_ext=1, kept=[0])
SCALE_IN_PLACE = body(("aten::mul_.Scalar", [["t"], ["i"]], [-1], [0]), n_ext=1, kept=[])


def execute(
    template: int, program: TemplateBody | None = None, *, ext=(), literals=(), releases=(), **options
) -> Execute:
    """States its vectors whole, so that no request depends on another."""
    return Execute(
        options.pop("nonce", "nonce"),
        template=template,
        body=program,
        vectors=whole(Vectors(literals, (), ext, releases)),
        **options,
    )


def dense(tensor: Tensor) -> tuple[TensorSpec, np.ndarray]:
    """Spec and bytes of a tensor, for Upload and for inputs."""
    spec, data, _owner = to_wire(tensor)
    return spec, np.frombuffer(bytearray(data), np.uint8)


def fetch(c: Connection, *handles: int) -> list[Tensor]:
    return fetched_tensors(*c.request(Execute("fetch", fetch=list(handles))))


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
