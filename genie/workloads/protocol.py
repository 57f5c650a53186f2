"""What a workload is: a model, seeded requests, and a plain PyTorch program that runs one request.

``run`` is written in unmodified PyTorch and is the same code for every baseline: local, on device
``genie``, and inside an RPC worker or Ray actor. It must not import anything else from ``genie``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Request:
    """One request. ``inputs`` are pageable CPU tensors by name; ``index`` seeded them.

    ``case`` names one op and size of the microbenchmark and is "" for all other workloads.
    """

    index: int
    inputs: dict[str, torch.Tensor]
    case: str = ""


@dataclass
class Response:
    """What one request returned: CPU tensors by name.

    ``token_s``: seconds from the start of the request until the k-th generated token was known to
    the host that runs the program (decode only, else empty).
    """

    outputs: dict[str, torch.Tensor]
    token_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """Verdict on one response against ``local_pytorch``: the schema's ``verified`` key."""

    ok: bool
    kind: str  # "tokens" | "allclose"
    max_abs_err: float | None
    detail: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """Recorded with every result. ``weights_sha256`` is over names, shapes, dtypes and raw bytes."""

    name: str
    params: int
    dtype: str
    weights_source: str  # "seeded" | "pretrained"
    weights_sha256: str


class Workload(Protocol):
    """One of the five workloads at the sizes of one profile. Picklable; the model is not part of it."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def params(self) -> dict[str, object]:
        """Extra parametrization, for example {"batch": 4}; empty for the default cell."""

    @property
    def cases(self) -> tuple[str, ...]:
        """("",) except for the microbenchmark: one name per op and size."""

    @property
    def splittable(self) -> bool:
        """True where a request's batch may be split by hand over several workers (the peers' idiom)."""

    def build_model(self) -> nn.Module:
        """The model on CPU, in eval mode and ``dtype``, gradients off; seeded or from a checkpoint."""

    def model_info(self, model: nn.Module) -> ModelInfo: ...

    def request(self, index: int, case: str = "") -> Request:
        """Request number ``index``; the same index gives the same tensors in every process."""

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        """Run ``request`` on ``model``, which lives on ``device``. Starts and ends in CPU tensors."""

    def split(self, request: Request, parts: int) -> list[Request]:
        """The request's batch cut into at most ``parts`` non-empty requests (by hand, for the peers)."""

    def merge(self, responses: list[Response]) -> Response:
        """Joins the responses to the parts of one request, in order."""

    def verify(
        self, model: nn.Module, request: Request, response: Response, reference: Response
    ) -> Verification:
        """Compares with ``reference`` (local, same inputs). ``model`` is the local one (fp16 tokens
        are judged by teacher forcing it on the returned ids)."""

    def state_bytes(self, request: Request) -> int:
        """Bytes of live state (KV cache) summed over the program's syncs, one way: what a runtime
        without semantics must move at least in each direction. 0 where no state outlives a sync."""
