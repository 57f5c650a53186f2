from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from genie import torchvision_compat  # noqa: F401 - before transformers
from genie.server.engines import inductor, tiers
from genie.server.engines.agree import disagreement
from genie.server.engines.emit import emit
from genie.server.engines.inductor import COMPILED, SEGMENT, WORTH_RUNS, Asked, Compiler
from genie.server.engines.segments import (
    NotCompilableError,
    from_text,
    joined,
    observe,
    segments,
    share_to_gain,
)
from genie.server.engines.tiers import Tiers
from tests.server.engines.programs import STACK_WIDTH, stack, stack_inputs
from tests.server.engines.serving import Serving, counters, prompt, session, tokens

aten = torch.ops.aten
CPU = torch.device("cpu")
COMPILE_S = 400.0
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU, and there is no g++"
)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path))
    return tmp_path / "inductor"


def wait_for(asked: Asked) -> None:
    end = time.monotonic() + COMPILE_S
    while not asked.done and time.monotonic() < end:
        time.sleep(0.05)
    assert asked.done, "the compiler did not finish in time"


# -- cutting ---------------------------------------------------------------------------------------


def test_equal_layers_become_equal_segments() -> None:
    graph, args = stack(layers=6), stack_inputs(layers=6)
    parts = segments(graph, observe(graph, args, CPU))
    texts = [p.text for p in parts]
    assert len(texts) >= 6
    assert len(set(texts)) <= 3
    assert max(texts.count(t) for t in texts) >= 5


def test_a_cut_is_behind_a_product() -> None:
    graph, args = stack(layers=4), stack_inputs(layers=4)
    parts = segments(graph, observe(graph, args, CPU))
    for part in parts[:-1]:
        products = [c for c in part.calls if c.target in (aten.linear.default, aten.addmm.default)]
        assert part.calls[-1] is products[-1]


def test_segments_joined_again_compute_the_same_and_write_to_the_same_buffers() -> None:
    graph, args = stack(layers=3), stack_inputs(layers=3)
    mine = copy.deepcopy(args)
    expected = emit(graph)(list(args))
    parts = segments(graph, observe(graph, copy.deepcopy(args), CPU))
    compiled = {p.text: from_text(p.text)[0].forward for p in parts}
    made = emit(joined(graph, parts, compiled))(mine)
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    torch.testing.assert_close(mine, args, rtol=0, atol=0)


def test_segments_that_are_not_compiled_run_call_by_call() -> None:
    graph, args = stack(layers=3), stack_inputs(layers=3)
    parts = segments(graph, observe(graph, copy.deepcopy(args), CPU))
    some = {parts[1].text: from_text(parts[1].text)[0].forward}
    expected = emit(graph)(copy.deepcopy(args))
    torch.testing.assert_close(emit(joined(graph, parts, some))(args), expected, rtol=0, atol=0)


def test_a_product_into_the_residual_is_not_done_in_place_where_compiled() -> None:
    graph, args = stack(layers=3, in_place=True), stack_inputs(layers=3)
    expected = emit(graph)(copy.deepcopy(args))
    parts = segments(graph, observe(graph, copy.deepcopy(args), CPU))
    assert not any(c.target is aten.addmm_.default for p in parts for c in p.calls)
    compiled = {p.text: from_text(p.text)[0].forward for p in parts}
    torch.testing.assert_close(emit(joined(graph, parts, compiled))(args), expected, rtol=0, atol=0)


def test_memory_that_is_written_to_under_several_names_is_not_cut() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    flat = graph.call_function(aten.view.default, (x, [-1]))
    values = x
    for _ in range(3):
        values = graph.call_function(aten.mul.Tensor, (values, x))
        values = graph.call_function(aten.mm.default, (values, values))
    graph.call_function(aten.add_.Tensor, (x, values))
    last = graph.call_function(aten.mul.Tensor, (flat, flat))
    graph.output([last, values])
    facts = observe(graph, [torch.eye(4)], CPU)
    with pytest.raises(NotCompilableError, match="several names"):
        segments(graph, facts)


def test_a_tensor_on_another_device_is_not_compiled() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_function(aten.relu.default, (x,))])
    with pytest.raises(NotCompilableError, match="meta"):
        observe(graph, [torch.empty(2, device="meta")], CPU)


def test_storages_are_told_apart_though_their_addresses_are_used_again() -> None:
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for _ in range(50):
        value = graph.call_function(aten.add.Tensor, (value, 1.0))
    view = graph.call_function(aten.view.default, (value, [-1]))
    graph.output([view])
    facts = observe(graph, [torch.zeros(64, 64)], CPU)
    numbers = [facts.specs[n].storage for n in graph.nodes if n in facts.specs]
    assert numbers[-1] == numbers[-2]
    assert len(set(numbers)) == 51


def test_small_kernels_are_worth_compiling_and_large_products_are_not() -> None:
    def share(rows: int) -> float:
        graph, args = stack(layers=2), stack_inputs(layers=2, rows=rows)
        facts = observe(graph, args, CPU)
        return share_to_gain(graph, facts, inductor.BANDWIDTH, inductor.FLOPS, inductor.KERNEL_S)

    assert share(1) > inductor.LEAST_TO_GAIN
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    product = graph.call_function(aten.mm.default, (x, w))
    graph.output([graph.call_function(aten.relu.default, (product,))])
    facts = observe(graph, [torch.zeros(2048, 2048)] * 2, CPU)
    assert share_to_gain(graph, facts, 3e15, 4e12, 1e-9) < inductor.LEAST_TO_GAIN


# -- when ------------------------------------------------------------------------------------------


def _ran(tiers: Tiers, seconds: float, compiled: bool) -> None:
    tiers.ran(0, compiled, lambda: (stack(layers=2), stack_inputs(layers=2)))
    tiers.took(seconds)


def test_a_program_that_ran_seldom_is_not_compiled(cache_folder: Path) -> None:
    kept = Tiers(Compiler(CPU))
    for _ in range(WORTH_RUNS - 1):
        _ran(kept, 1.0, False)
    assert kept.run(0) is None
    assert not cache_folder.exists()


def test_without_a_compiler_nothing_is_asked_for() -> None:
    kept = Tiers(None)
    for _ in range(2 * WORTH_RUNS):
        kept.ran(0, False, lambda: pytest.fail("nobody compiles it"))
    assert kept.run(0) is None


def test_compiled_code_that_is_slower_is_given_up() -> None:
    kept = _with(emit(stack(layers=2)))
    for _ in range(tiers.TRIALS):
        _ran(kept, 2.0, True)
    assert kept.run(0) is not None
    _ran(kept, 2.0, True)
    assert kept.run(0) is None


def test_compiled_code_that_is_faster_stays() -> None:
    kept = _with(emit(stack(layers=2)))
    for _ in range(3 * tiers.TRIALS):
        _ran(kept, 0.5, True)
    assert kept.run(0) is not None


def test_compiled_code_that_computes_something_else_is_found_out() -> None:
    plain = emit(stack(layers=2))

    def wrong(args: list) -> list:
        return [None if v is None else v + 1.0 for v in plain(args)]

    args = stack_inputs(layers=2)
    assert "differs by" in _with(wrong).verify(0, plain, args, [])
    assert _with(plain).verify(0, plain, args, []) == ""


def test_compiled_code_whose_results_no_longer_share_memory_is_found_out() -> None:
    def views(args: list) -> list:
        doubled = args[0] * 2
        return [doubled, doubled.view(-1)]

    def copies(args: list) -> list:
        return [args[0] * 2, (args[0] * 2).view(-1)]

    args = [torch.ones(2, 2)]
    assert "shares memory" in _with(copies).verify(0, views, args, [])
    assert _with(views).verify(0, views, args, []) == ""


def test_compiled_code_that_writes_something_else_is_found_out() -> None:
    plain, args = emit(stack(layers=2)), stack_inputs(layers=2)
    buffers = [a for a in args if a.ndim == 4]

    def wrong(given: list) -> list:
        kept = plain(given)
        buffers[0].narrow(2, 0, 1).add_(1.0)
        return kept

    assert "differs by" in _with(wrong).verify(0, plain, args, buffers)


def _with(run) -> Tiers:
    """As if the program had run, and been compiled to ``run``."""
    kept = Tiers(None)
    _ran(kept, 1.0, False)
    kept._tiers[0].asked = Asked(run=run)
    return kept


# -- compiling -------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.timeout(2 * COMPILE_S)
def test_a_compiled_program_computes_the_same_and_is_loaded_by_the_next_server(cache_folder: Path) -> None:
    graph, args = stack(layers=3), stack_inputs(layers=3)
    expected = copy.deepcopy(args)
    plain = emit(graph)(expected)
    first = Compiler(CPU).ask(stack(layers=3), copy.deepcopy(args))
    wait_for(first)
    assert first.run is not None, first.failed
    assert first.child_s > 0
    mine = copy.deepcopy(args)
    assert disagreement(first.run(mine), plain) == ""
    assert disagreement(mine, expected) == ""
    folders = sorted(p.parent for p in cache_folder.glob(f"*/{SEGMENT}"))
    assert len(folders) <= 3
    assert all((f / COMPILED).exists() for f in folders)
    # Another server of this user finds it on the disk.
    second = Compiler(CPU).ask(stack(layers=3), copy.deepcopy(args))
    wait_for(second)
    assert second.run is not None, second.failed
    assert second.child_s == 0
    assert disagreement(second.run(copy.deepcopy(args)), plain) == ""
    # A file that is torn is no reason to fail: the segment runs as it did.
    for folder in folders:
        (folder / COMPILED).write_bytes(b"torn")
    third = Compiler(CPU).ask(stack(layers=3), copy.deepcopy(args))
    wait_for(third)
    assert third.run is None
    assert "no segment of it could be compiled" in third.failed


def test_a_compiler_that_fails_leaves_no_process_and_says_why(cache_folder: Path) -> None:
    asked = Compiler(CPU, {"no such option": True}).ask(stack(layers=2), stack_inputs(layers=2))
    wait_for(asked)
    assert asked.run is None
    assert "no segment of it could be compiled" in asked.failed
    assert _processes_with(str(cache_folder)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_the_child_ends_with_a_server_that_is_killed(cache_folder: Path) -> None:
    code = (
        "import torch, time\n"
        "from genie.server.engines.inductor import Compiler\n"
        "from tests.server.engines.programs import stack, stack_inputs\n"
        "asked = Compiler(torch.device('cpu')).ask(stack(layers=4), stack_inputs(layers=4))\n"
        "time.sleep(300)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}, start_new_session=True
    )
    try:
        # In the middle of it: with the C++ compiler that the child started.
        processes = 1 if shutil.which("g++") is None else 2
        assert _eventually(lambda: len(_processes_with(str(cache_folder))) >= processes)
        server.send_signal(signal.SIGKILL)
        server.wait(30)
        assert _eventually(lambda: _processes_with(str(cache_folder)) == [])
    finally:
        server.kill()
        server.wait(30)


def _eventually(holds, seconds: float = 90.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False


def _processes_with(text: str) -> list[int]:
    """Whose command line has it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


# -- models ----------------------------------------------------------------------------------------


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_positions=256, n_embd=STACK_WIDTH, n_layer=3, n_head=2, bos_token_id=1,
            eos_token_id=1,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


@needs_compiler
@pytest.mark.timeout(2 * COMPILE_S)
@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_decoding_runs_compiled_from_the_next_generation_on(
    graphs: Serving, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, build
) -> None:
    monkeypatch.setattr(tiers, "SLOWER", float("inf"))  # on a CPU it may be
    compiler = graphs.pool.compiler = Compiler(CPU)
    asked: list[Asked] = []

    def ask(*given) -> Asked:
        asked.append(Compiler.ask(compiler, *given))
        return asked[-1]

    monkeypatch.setattr(compiler, "ask", ask)
    torch.manual_seed(0)
    model = build().eval()
    ids = prompt()
    expected = tokens(model, ids, "cpu")
    with session(graphs) as opened:
        mine = copy.deepcopy(model).to("genie")
        for _ in range(2):
            assert torch.equal(tokens(mine, ids, "genie"), expected)
        assert len(asked) == 1
        counters(opened)
        wait_for(asked[0])
        assert asked[0].run is not None, asked[0].failed
        assert torch.equal(tokens(mine, ids, "genie"), expected)
        seen = counters(opened)
        assert seen["engine_compiled"] >= 20
        assert seen["engine_failed"] == 0
        growing = [i for alike in graphs.pool._instances.values() for i in alike if i.buffers]
        assert any(i.compiled for i in growing)
        assert [i for i in growing if not i.compiled and not i.busy] == []  # their memory was let go


def test_a_session_that_allows_graphs_alone_is_not_compiled(graphs: Serving, cache_folder: Path) -> None:
    graphs.pool.compiler = Compiler(CPU)
    torch.manual_seed(0)
    model = _gpt2().eval()
    with session(graphs, engines=("graph",)) as opened:
        mine = copy.deepcopy(model).to("genie")
        tokens(mine, prompt(), "genie", new=WORTH_RUNS + 8)
        assert counters(opened)["engine_graph"] > WORTH_RUNS
    assert not cache_folder.exists()
