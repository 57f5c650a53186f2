"""The example policy, given directly and through its entry point; and entry points that give no policy."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from genie.errors import PlanError
from genie.scheduler.plan import Declined
from genie.scheduler.policies import ENTRY_POINTS, load_policies
from genie.scheduler.schedule import schedule
from tests.frontend import models
from tests.scheduler.graphs import Making
from tests.srg.programs import largest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_policy"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import pin_modules

    yield pin_modules
    del sys.modules["pin_modules"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Writes the metadata of an installed package with these entry points."""

    def install(points: dict[str, str]) -> None:
        folder = tmp_path / "a_policy-0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: a-policy\nVersion: 0.1\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines]))
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def forward() -> None:
    import torch

    model = models.gpt2().to("genie")
    model(torch.arange(6)[None].to("genie")).logits.cpu()


def test_modules_run_where_they_are_pinned(example) -> None:
    graph = largest(forward)
    assert {n.module for n in graph.nodes} >= {"lm_head", "transformer.h.0.mlp.c_fc"}
    m = Making(graph.nodes, graph.externals)
    plan = schedule(m.problem(), [example.PinModules({"lm_head": 1, "transformer.h.1.mlp": 1})])
    assert plan.placement.policy == "pin_modules"
    for node in graph.nodes:
        if node.module and not node.is_view:
            pinned = node.module.startswith(("lm_head", "transformer.h.1.mlp"))
            assert plan.placement.servers[node.number] == ((1,) if pinned else (0,)), node.module
    assert {t.target for t in plan.transfers if t.source >= 0} == {0, 1}


def test_pins_to_no_server_and_modules_that_are_not_there_are_declined(example) -> None:
    m = Making()
    m.op(us=1)
    for pins, why in (({"lm_head": 5}, "2 servers"), ({"lm_head": 1}, "no module lm_head")):
        (declined,) = example.PinModules(pins).propose(m.problem())
        assert isinstance(declined, Declined) and why in declined.why


def test_the_examples_entry_point_is_found_and_asked(example, installed, monkeypatch) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    installed(project["entry-points"][ENTRY_POINTS])
    monkeypatch.setenv("GENIE_PIN_MODULES", "lm_head=1")
    (policy,) = load_policies()
    assert policy.name == "pin_modules" and policy.pins == {"lm_head": 1}


def test_without_any_there_are_none() -> None:
    assert load_policies("genie.policies.of_nobody") == []


@pytest.mark.parametrize("value", ["no_such_module:Policy", "pin_modules:PinModules", "builtins:dict"])
def test_an_entry_point_that_gives_no_policy_is_named(example, installed, value) -> None:
    installed({"broken": value})
    with pytest.raises(PlanError, match=f"entry point broken = {value}"):
        load_policies()
