"""microbenchmark: single ops at many sizes, each with its FLOPs and bytes.

A case is "<op>/<n>". What n means for each op:

    matmul       (n, n) @ (n, n)
    linear       n tokens of width n to width 4n, with bias
    conv2d       one n x n image of 64 channels, 3 x 3 kernel, to 64 channels
    attention    12 heads of 64, n queries on n keys (scaled_dot_product_attention, no mask)
    norm         layer_norm of n rows of 1024
    softmax      rows of an n x n matrix
    elementwise  gelu(x + y) on (n, 1024)
    embedding    n rows out of a table of 8192 x 768
    reduction    sums of the rows of an n x n matrix
    cat          two (n, 1024) matrices, one above the other

Weights are resident in the model; activations come with the request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genie.errors import ConfigError
from genie.workloads import batches, seeding, weights
from genie.workloads.profiles import MicroSize, get_profile
from genie.workloads.protocol import ModelInfo, Request, Response, Verification
from genie.workloads.verify import verify_tensors

_CHANNELS, _KERNEL = 64, 3
_HEADS, _HEAD_DIM = 12, 64
_ROW = 1024
_TABLE, _EMBED = 8192, 768


@dataclass(frozen=True)
class OpCase:
    """One op at one size, as a cost model needs it.

    ``flops``: a multiply-add is 2; layer_norm 8, softmax 5 and gelu 8 per element (the usual
    conventions; only matmul-like ops are ever bound by them). ``bytes``: operands and weights read
    and results written once each, in device memory; copies from and to the host are not in it.
    ``held_out`` marks the size on which a cost model is judged instead of fitted.
    """

    name: str
    op: str
    sizes: tuple[int, ...]
    flops: int
    bytes: int
    held_out: bool


@dataclass(frozen=True)
class _Op:
    """Input shapes, resident weights, FLOPs, elements moved, and the program, each for a size n."""

    inputs: Callable[[int], dict[str, tuple[int, ...]]]
    flops: Callable[[int], int]
    elements: Callable[[int], int]
    run: Callable[[Any, dict[str, Tensor]], Tensor]
    module: Callable[[int], nn.Module] | None = None


def _square(n: int) -> dict[str, tuple[int, ...]]:
    return {"x": (n, n)}


def _rows(n: int) -> dict[str, tuple[int, ...]]:
    return {"x": (n, _ROW)}


def _two_rows(n: int) -> dict[str, tuple[int, ...]]:
    return {"x": (n, _ROW), "y": (n, _ROW)}


_OPS: dict[str, _Op] = {
    "matmul": _Op(
        inputs=lambda n: {"x": (n, n), "y": (n, n)},
        flops=lambda n: 2 * n**3,
        elements=lambda n: 3 * n * n,
        run=lambda _, t: torch.matmul(t["x"], t["y"]),
    ),
    "linear": _Op(
        inputs=_square,
        flops=lambda n: 8 * n**3,
        elements=lambda n: 9 * n * n + 4 * n,
        run=lambda module, t: module(t["x"]),
        module=lambda n: nn.Linear(n, 4 * n),
    ),
    "conv2d": _Op(
        inputs=lambda n: {"x": (1, _CHANNELS, n, n)},
        flops=lambda n: 2 * n * n * _CHANNELS**2 * _KERNEL**2,
        elements=lambda n: 2 * n * n * _CHANNELS + _CHANNELS**2 * _KERNEL**2,
        run=lambda module, t: module(t["x"]),
        module=lambda n: nn.Conv2d(_CHANNELS, _CHANNELS, _KERNEL, padding=_KERNEL // 2, bias=False),
    ),
    "attention": _Op(
        inputs=lambda n: dict.fromkeys(("q", "k", "v"), (1, _HEADS, n, _HEAD_DIM)),
        flops=lambda n: _HEADS * (4 * n * n * _HEAD_DIM + 5 * n * n),
        elements=lambda n: 4 * _HEADS * n * _HEAD_DIM,
        run=lambda _, t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"]),
    ),
    "norm": _Op(
        inputs=_rows,
        flops=lambda n: 8 * n * _ROW,
        elements=lambda n: 2 * n * _ROW + 2 * _ROW,
        run=lambda module, t: module(t["x"]),
        module=lambda n: nn.LayerNorm(_ROW),
    ),
    "softmax": _Op(
        inputs=_square,
        flops=lambda n: 5 * n * n,
        elements=lambda n: 2 * n * n,
        run=lambda _, t: torch.softmax(t["x"], dim=-1),
    ),
    "elementwise": _Op(
        inputs=_two_rows,
        flops=lambda n: 9 * n * _ROW,
        elements=lambda n: 5 * n * _ROW,  # add reads 2 and writes 1, gelu reads 1 and writes 1
        run=lambda _, t: F.gelu(t["x"] + t["y"]),
    ),
    "embedding": _Op(
        inputs=lambda n: {"ids": (n,)},
        flops=lambda n: 0,
        elements=lambda n: 2 * n * _EMBED,
        run=lambda module, t: module(t["ids"]),
        module=lambda n: nn.Embedding(_TABLE, _EMBED),
    ),
    "reduction": _Op(
        inputs=_square,
        flops=lambda n: n * n,
        elements=lambda n: n * n + n,
        run=lambda _, t: t["x"].sum(dim=-1),
    ),
    "cat": _Op(
        inputs=_two_rows,
        flops=lambda n: 0,
        elements=lambda n: 4 * n * _ROW,
        run=lambda _, t: torch.cat([t["x"], t["y"]]),
    ),
}


class ResidentWeights(nn.ModuleDict):
    """One module per case that has weights, by the case's name; it has no forward of its own."""


@dataclass(frozen=True)
class Microbenchmark:
    profile: str
    size: MicroSize
    weights: str = "seeded"

    name: ClassVar[str] = "microbenchmark"
    splittable: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype:
        return get_profile(self.profile).dtype

    @property
    def params(self) -> dict[str, object]:
        return {}

    @cached_property
    def op_cases(self) -> tuple[OpCase, ...]:
        """All cases, op by op, each from small to large."""
        itemsize = self.dtype.itemsize
        found = []
        for name, sizes in self.size.sizes:
            op = _OPS[name]
            for position, n in enumerate(sizes):
                ids = 8 * n if name == "embedding" else 0
                moved = op.elements(n) * itemsize + ids
                # Never the smallest, and the largest only where there are but two.
                held_out = position == len(sizes) // 2
                found.append(OpCase(f"{name}/{n}", name, (n,), op.flops(n), moved, held_out))
        return tuple(found)

    @cached_property
    def cases(self) -> tuple[str, ...]:
        return tuple(case.name for case in self.op_cases)

    def build_model(self) -> nn.Module:
        def build() -> nn.Module:
            modules = {}
            for name, sizes in self.size.sizes:
                make = _OPS[name].module
                if make is not None:
                    modules.update({f"{name}/{n}": make(n) for n in sizes})
            return ResidentWeights(modules)

        return weights.seeded(build, self.dtype)

    def model_info(self, model: nn.Module) -> ModelInfo:
        return weights.model_info(model, "ops", self.dtype, None)

    def request(self, index: int, case: str = "") -> Request:
        if case not in self.cases:
            raise ConfigError(f"microbenchmark has no case {case!r}: choose one of {', '.join(self.cases)}")
        name, n = case.split("/")
        source = seeding.generator(self.name, index, case)
        inputs = {
            key: (
                seeding.token_ids(shape, _TABLE, source)
                if key == "ids"
                else seeding.uniform(shape, self.dtype, source)
            )
            for key, shape in _OPS[name].inputs(int(n)).items()
        }
        return Request(index, inputs, case)

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        """Runs the one op that ``request.case`` names."""
        op = _OPS[request.case.split("/")[0]]
        module = model[request.case] if op.module is not None else None  # type: ignore[index]
        with torch.no_grad():
            inputs = {name: tensor.to(device) for name, tensor in request.inputs.items()}
            return Response({"y": op.run(module, inputs).cpu()})

    def split(self, request: Request, parts: int) -> list[Request]:
        return [request]

    def merge(self, responses: list[Response]) -> Response:
        return batches.only(responses)

    def verify(
        self, model: nn.Module, request: Request, response: Response, reference: Response
    ) -> Verification:
        return verify_tensors(response.outputs, reference.outputs, self.dtype)

    def state_bytes(self, request: Request) -> int:
        return 0
