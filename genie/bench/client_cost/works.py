"""What the client-cost benchmarks run: tiny models, so that an op costs its dispatch and nothing else.

A work is what a baseline runs (`build_model`, `model_info`, `request` and `run` of a workload), and its
`run` is the same PyTorch program on the CPU and on device ``genie``. It times a part of itself: what
stands before (inputs) and after (reading the result back) belongs to no step.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genie.errors import VerificationError
from genie.workloads import seeding, weights
from genie.workloads.protocol import ModelInfo, Request, Response

PROMPT, VOCABULARY = 8, 128
STEPS, TOKENS = 8, 16
#: of the smallest GPT-2, for which the targets are stated; the largest (48) has one of its own
PUBLISHED_LAYERS = 12
#: fp32 on the same kernels; a server may have fused ones
TOLERANCE = 1e-4


@dataclass
class Measured(Response):
    """A response, and what its timed part cost this process for each unit of work, in seconds.

    ``cpu_s`` is processor time of all threads of this process: waiting for a server costs none.
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True)
class Target:
    """What a figure should stay below: a ratio to eager PyTorch, or seconds for each unit; or nothing."""

    ratio: float | None = None
    seconds: float | None = None


class Work(Protocol):
    """One kind of work. ``unit`` is what the figure is of; ``clock`` says which figure, "cpu" or "wall".

    ``calls`` of the model are in one request: where they are replayed, as many replayed programs.
    """

    case: str
    unit: str
    clock: str
    rounds: int
    calls: int

    def target(self, capture: str) -> Target: ...

    def build_model(self) -> nn.Module: ...

    def model_info(self, model: nn.Module) -> ModelInfo: ...

    def request(self, index: int, case: str = "") -> Request: ...

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response: ...

    def eager(self, model: nn.Module, request: Request) -> Measured:
        """The plain PyTorch that the cost is compared with, on the CPU of this process."""

    def check(self, model: nn.Module, request: Request, response: Response, eager: Measured) -> float:
        """The largest absolute error of ``response``. Raises VerificationError where it is not right."""


class Stopwatch:
    """Adds up processor time and wall time of the blocks it is entered for."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.wall_s += wall - self._start[0]
        self.cpu_s += cpu - self._start[1]

    def measured(self, outputs: dict[str, Tensor], units: int) -> Measured:
        return Measured(outputs, cpu_s=self.cpu_s / units, wall_s=self.wall_s / units)


def _recorder() -> Any:
    # Imported here, and used by names as old as it is: the gate runs this beside older runtimes.
    from genie.frontend.session import current

    return current().recorder


def hand_over() -> None:
    """Sends what is recorded, without waiting for it. What is only freed goes with the next program."""
    recorder = _recorder()
    if recorder._entries:
        recorder.flush()


def _is_genie(device: str | torch.device) -> bool:
    return torch.device(device).type == "genie"


class _TinyGpt2:
    """GPT-2 of published depth and no width."""

    clock = "cpu"

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def build_model(self) -> nn.Module:
        # The first of them comes before any import of transformers, wherever that may be.
        import genie.torchvision_compat  # noqa: F401  isort: skip
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=self.layers, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=64,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return weights.seeded(lambda: GPT2LMHeadModel(config), torch.float32)

    def model_info(self, model: nn.Module) -> ModelInfo:
        return weights.model_info(model, f"gpt2, {self.layers} layers of width 32", torch.float32, None)


class DecodeSteps(_TinyGpt2):
    """Steps of one token with a growing KV cache, the prompt's being there: a call and its hand-over."""

    unit, calls = "step", STEPS

    def __init__(self, layers: int, rounds: int = 15) -> None:
        super().__init__(layers)
        self.rounds = rounds
        self.case = f"decode step, {layers} layers"
        self._prompts: dict[str, Any] = {}

    def target(self, capture: str) -> Target:
        if self.layers < PUBLISHED_LAYERS:
            return Target()
        return Target(ratio=0.35 if capture == "replayed" else 1.6)

    def request(self, index: int, case: str = "") -> Request:
        source = seeding.generator("client_cost", index)
        return Request(index, {"ids": seeding.token_ids((1, STEPS), VOCABULARY, source)})

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        watch, remote = Stopwatch(), _is_genie(device)
        cache = copy.deepcopy(self._prompt(model, device))
        tokens = request.inputs["ids"].to(device).split(1, 1)
        logits = None
        if remote:
            hand_over()
        for token in tokens:
            with watch:
                logits = model(token, past_key_values=cache, use_cache=True).logits
                if remote:
                    hand_over()
        assert logits is not None
        return watch.measured({"logits": logits.cpu()}, STEPS)

    def _prompt(self, model: nn.Module, device: str | torch.device) -> Any:
        """The cache after the prompt; made once, so that replay has no second kind of call to compile."""
        key = torch.device(device).type
        if key not in self._prompts:
            ids = seeding.token_ids((1, PROMPT), VOCABULARY, seeding.generator("client_cost", "prompt"))
            self._prompts[key] = model(ids.to(device), use_cache=True).past_key_values
        return self._prompts[key]

    def eager(self, model: nn.Module, request: Request) -> Measured:
        measured = self.run(model, request, "cpu")
        assert isinstance(measured, Measured)
        return measured

    def check(self, model: nn.Module, request: Request, response: Response, eager: Measured) -> float:
        return _close(self.case, response.outputs["logits"], eager.outputs["logits"])


class Generation(_TinyGpt2):
    """Greedy ``generate()``, from its prompt on the host to its tokens there; eager beside it: one step.

    A request's ``case`` may be another number of tokens.
    """

    unit, calls = "token", TOKENS

    def __init__(self, layers: int, rounds: int) -> None:
        super().__init__(layers)
        self.rounds = rounds
        self.case = f"generate(), {layers} layers"
        self._steps = DecodeSteps(layers)

    def target(self, capture: str) -> Target:
        if capture == "lazy":
            return Target()
        return Target(ratio=0.8) if self.layers == PUBLISHED_LAYERS else Target(seconds=3e-3)

    def request(self, index: int, case: str = "") -> Request:
        source = seeding.generator("client_cost", "prompt", index)
        return Request(index, {"ids": seeding.token_ids((1, PROMPT), VOCABULARY, source)}, case)

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        tokens = int(request.case or TOKENS)
        watch = Stopwatch()
        with watch:
            ids = request.inputs["ids"].to(device)
            made = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0,
            ).cpu()  # fmt: skip
        return watch.measured({"ids": made}, tokens)

    def eager(self, model: nn.Module, request: Request) -> Measured:
        return self._steps.eager(model, self._steps.request(request.index))

    def check(self, model: nn.Module, request: Request, response: Response, eager: Measured) -> float:
        """Each token must be the one that eager PyTorch chooses after those before it."""
        prompt, ids = request.inputs["ids"], response.outputs["ids"]
        tokens = int(request.case or TOKENS)
        if ids.shape != (1, PROMPT + tokens) or not torch.equal(ids[:, :PROMPT], prompt):
            raise VerificationError(f"{self.case}: {list(ids.shape)} ids, or another prompt than was given")
        logits = model(ids).logits[0, PROMPT - 1 : -1]
        logits[:, model.config.eos_token_id] = -torch.inf  # type: ignore[union-attr]
        chosen = logits.gather(1, ids[0, PROMPT:, None])[:, 0]
        short = float((logits.max(1).values - chosen).max())
        if not short <= TOLERANCE:
            raise VerificationError(
                f"{self.case}: a token's logit is {short} below the maximum: eager PyTorch generates others"
            )
        return short


class _Chain(nn.Module):
    """matmul, add, view, mul, view, again and again on what came out. Dispatch is all that it costs."""

    OPS = 5

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats = repeats
        self.w = nn.Parameter(torch.empty(16, 16))
        self.b = nn.Parameter(torch.empty(16))
        for name, tensor in (("w", self.w), ("b", self.b)):
            seeding.fill_uniform(tensor.data, 0.25, seeding.generator("client_cost", name))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.w, self.b
        for _ in range(self.repeats):
            y = (torch.matmul(x, w) + b).view(-1, 4, 4)
            x = (y * 0.5).view(-1, 16)
        return x


class _ChainWork:
    """The common part of what is measured with a `_Chain`."""

    case: str
    clock = "cpu"
    repeats = 100
    rounds = 15
    calls = 1

    def build_model(self) -> nn.Module:
        return weights.freeze(_Chain(self.repeats))

    def model_info(self, model: nn.Module) -> ModelInfo:
        ops = f"chain of {self.repeats * _Chain.OPS} ops"
        return weights.model_info(model, ops, torch.float32, None)

    def request(self, index: int, case: str = "") -> Request:
        return Request(index, {"x": _rows(index, 16)})

    def eager(self, model: nn.Module, request: Request) -> Measured:
        measured = self.run(model, request, "cpu")
        assert isinstance(measured, Measured)
        return measured

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        raise NotImplementedError

    def check(self, model: nn.Module, request: Request, response: Response, eager: Measured) -> float:
        return max(
            _close(f"{self.case}, {name}", value, eager.outputs[name])
            for name, value in response.outputs.items()
        )


class HotOps(_ChainWork):
    """Ops that were captured before: recording them, and handing over their programs."""

    case, unit = "op, captured before", "op"

    def target(self, capture: str) -> Target:
        return Target()

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        watch, remote = Stopwatch(), _is_genie(device)
        x = request.inputs["x"].to(device)
        with watch:
            y = model(x)
            if remote:
                hand_over()
        return watch.measured({"y": y.cpu()}, self.repeats * _Chain.OPS)


class FirstSight(_ChainWork):
    """Ops of sizes that the session has not met: their shapes are inferred, the server checks them."""

    case, unit = "op, at first sight", "op"
    repeats = 1
    #: sizes of one request; no two requests have one in common
    SIZES = 10

    def target(self, capture: str) -> Target:
        return Target()

    def request(self, index: int, case: str = "") -> Request:
        sizes = range(2 + index * self.SIZES, 2 + (index + 1) * self.SIZES)
        return Request(index, {f"x{n}": _rows(index, n) for n in sizes})

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        watch, remote = Stopwatch(), _is_genie(device)
        inputs = {name: value.to(device) for name, value in request.inputs.items()}
        with watch:
            outputs = {name: model(value) for name, value in inputs.items()}
            if remote:
                hand_over()
        return watch.measured({name: y.cpu() for name, y in outputs.items()}, self.SIZES * _Chain.OPS)


class SendProgram(_ChainWork):
    """A recorded program of 500 ops whose template the server has: from hand-over until the kernel has
    its last byte. Eager beside it: running these ops."""

    case, unit, clock = "look up and send 500 ops", "program", "wall"

    def target(self, capture: str) -> Target:
        return Target(seconds=0.5e-3)

    def run(self, model: nn.Module, request: Request, device: str | torch.device) -> Response:
        watch = Stopwatch()
        x = request.inputs["x"].to(device)
        if not _is_genie(device):
            with watch:
                y = model(x)
            return watch.measured({"y": y}, 1)
        with _in_one_program():
            y = model(x)
            with watch:
                hand_over()
        return watch.measured({"y": y.cpu()}, 1)


@contextmanager
def _in_one_program() -> Iterator[None]:
    """Nothing is handed over early: the program is all that is recorded in the block."""
    recorder = _recorder()
    hand_over()
    chunk, recorder._chunk = recorder._chunk, sys.maxsize
    try:
        yield
    finally:
        recorder._chunk = chunk


def _rows(index: int, rows: int) -> Tensor:
    return seeding.uniform((rows, 16), torch.float32, seeding.generator("client_cost", index, rows))


def _close(what: str, value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        raise VerificationError(f"{what}: shape {list(value.shape)}, not {list(expected.shape)}")
    error = float((value - expected).abs().max())
    if not error <= TOLERANCE:
        raise VerificationError(f"{what}: {error} off eager PyTorch's, more than {TOLERANCE}")
    return error
