"""Replay without being asked for, in sessions with ``replay=True``."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import genie
from genie.frontend.replay import automatic as module
from genie.frontend.session import Session
from tests.frontend import models


def deep(width: int = 8, layers: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))).eval()


GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def keeps_its_counter_on_the_cpu() -> bool:
    """Older static caches of transformers count on the host what they hold on the device."""
    from transformers.cache_utils import StaticLayer

    return "cumulative_length.to" not in inspect.getsource(StaticLayer.lazy_initialization)


def check_generate(session: Session, build, cache: str | None) -> None:  # type: ignore[no-untyped-def]
    model = build(layers=1)
    options = GREEDY | ({"cache_implementation": cache} if cache else {})
    remote = copy.deepcopy(model).to("genie")
    for index in range(2):
        ids = torch.randint(3, 500, (2, 7), generator=torch.Generator().manual_seed(index))
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, **options)
        before = session.recorder.replays, session.recorder.syncs
        tokens = remote.generate(ids.to("genie"), attention_mask=mask.to("genie"), **options)
        syncs = session.recorder.syncs - before[1]
        assert torch.equal(tokens.cpu(), expected)
        assert syncs == 10  # one a token; the host knows all that is asked before the first
    if cache == "static" and keeps_its_counter_on_the_cpu():
        assert session.recorder.replays == 0  # a graph with a CPU tensor is captured lazily
    else:
        assert session.recorder.replays - before[0] >= 9  # every step; the prompt too where it can be


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("build", [models.gpt2, models.llama])
def test_generate_replays_its_steps_and_gives_the_tokens_of_the_cpu(automatic: Session, build, cache) -> None:  # type: ignore[no-untyped-def]
    check_generate(automatic, build, cache)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_replays_on_servers_and_with_state_on_the_client(anywhere: Session, cache) -> None:  # type: ignore[no-untyped-def]
    check_generate(anywhere, models.gpt2, cache)


def test_the_first_call_of_a_kind_is_lazy_and_the_second_compiled(automatic: Session) -> None:
    model = deep().to("genie")
    x = torch.ones(3, 8, device="genie")
    model(x)
    assert automatic.recorder.replays == 0
    model(x)
    assert automatic.recorder.replays == 1
    model(torch.ones(1, 8, device="genie"))  # another kind: a size is 1
    assert automatic.recorder.replays == 1


def test_small_modules_are_not_compiled(automatic: Session) -> None:
    layer = nn.Linear(8, 8).to("genie").requires_grad_(False)
    for _ in range(4):
        layer(torch.ones(3, 8, device="genie"))
    assert automatic.recorder.replays == 0


def test_inner_modules_called_from_outside_replay_too(automatic: Session) -> None:
    model = models.clip()
    remote = copy.deepcopy(model).to("genie")
    pixels = torch.randn(2, 3, 32, 32)
    expected = model.vision_model(pixel_values=pixels).pooler_output
    for _ in range(3):
        out = remote.vision_model(pixel_values=pixels.to("genie")).pooler_output
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert automatic.recorder.replays == 2


def test_modules_that_override_call_are_one_graph_with_the_rest(automatic: Session) -> None:
    class Layer(nn.Linear):
        def __call__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().__call__(*args, **kwargs)

    model = nn.Sequential(*(Layer(8, 8) for _ in range(module.LEAST_OPS))).eval()
    remote = copy.deepcopy(model).to("genie")
    x = torch.ones(3, 8)
    for _ in range(3):
        torch.testing.assert_close(remote(x.to("genie")).cpu(), model(x))
    assert automatic.recorder.replays == 2
    state = module.state_of(remote)
    assert state is not None
    assert (state.graphs, state.lazy) == (1, "")


def test_training_is_captured_op_by_op(automatic: Session) -> None:
    model = deep().to("genie")
    with torch.enable_grad():
        for _ in range(3):
            model(torch.ones(3, 8, device="genie")).sum().backward()
    assert automatic.recorder.replays == 0
    assert module.state_of(model) is None


def test_a_hook_added_after_compiling_is_called(automatic: Session) -> None:
    model = deep()
    remote = copy.deepcopy(model).to("genie")
    x = torch.ones(3, 8)
    for _ in range(3):
        remote(x.to("genie"))
    calls = []

    def double(layer, args, out):  # type: ignore[no-untyped-def]
        calls.append(layer)
        return out * 2

    for m in (model, remote):
        m[3].register_forward_hook(double)
    for _ in range(2):
        torch.testing.assert_close(remote(x.to("genie")).cpu(), model(x))
    assert len(calls) >= 4


def test_a_module_that_never_settles_stays_lazy_and_says_so_once(automatic: Session) -> None:
    class Unsettled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            scale = float(self.calls) ** 0.5  # a Python number that is another in every call
            return self.body(x) * scale

    model = Unsettled().to("genie")
    x = torch.ones(3, 8)
    reference = model.body
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(1, 30):
            out = model(x.to("genie"))
            torch.testing.assert_close(out, reference(x.to("genie")) * float(n) ** 0.5)
    said = [w for w in caught if "needs new graphs all the time" in str(w.message)]
    state = module.state_of(model)
    assert state is not None
    assert bool(state.lazy) == (len(said) == 1)
    assert len(said) <= 1
    assert state.graphs <= module.MAX_GRAPHS + 1


def test_a_module_that_dynamo_cannot_trace_stays_lazy(automatic: Session, caplog) -> None:  # type: ignore[no-untyped-def]
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return y * 2 if y.sum().item() > 0 else y * 3

    model = Branching()
    remote = copy.deepcopy(model).to("genie")
    for n in range(4):
        x = torch.full((3, 8), float(n - 2))
        torch.testing.assert_close(remote(x.to("genie")).cpu(), model(x))


def test_without_replay_nothing_is_hooked_and_nothing_stays_hooked() -> None:
    with genie.local():
        assert nn.Module._compiled_call_impl is None
    with genie.local(replay=True), genie.local(replay=True):
        assert nn.Module._compiled_call_impl is not None
    assert nn.Module._compiled_call_impl is None


def test_models_on_the_cpu_are_left_alone(automatic: Session) -> None:
    model = deep()
    for _ in range(3):
        model(torch.ones(3, 8))
    assert module.state_of(model) is None


def test_two_threads_replay_two_models(automatic: Session) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(seed: int) -> list[torch.Tensor]:
        with torch.no_grad():
            torch.manual_seed(seed)
            model = deep(width=4 + seed)
            remote = copy.deepcopy(model).to("genie")
            x = torch.full((2, 4 + seed), 0.5)
            return [remote(x.to("genie")).cpu() - model(x) for _ in range(6)]

    with ThreadPoolExecutor(2) as pool:
        for differences in pool.map(work, (0, 1), timeout=120):
            assert all(d.abs().max() < 1e-5 for d in differences)
