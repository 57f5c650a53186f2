"""Each policy puts the right thing in the right place, or says why it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genie.scheduler.batch_axis import prove
from genie.scheduler.batch_split import proportional_rows
from genie.scheduler.forced import Forced
from genie.scheduler.joining import Join, join_of_state
from genie.scheduler.plan import Declined, Placement
from genie.scheduler.policies import BUILT_IN, Branches, Colocation, Pipelining, Prefill, RoundRobin
from genie.scheduler.problem import Problem
from genie.scheduler.schedule import schedule
from genie.scheduler.simulate import predict
from genie.scheduler.validate import validate
from genie.scheduler.where import Axis, Shard, Where
from genie.srg.graph import Phase, Residency
from tests.frontend import models
from tests.scheduler.graphs import Making, pool
from tests.srg.programs import graphs_of, largest

KV = Residency.STATEFUL_KV_CACHE


def proposals(policy, problem: Problem) -> list[Placement]:
    found = list(policy.propose(problem))
    for p in found:
        assert isinstance(p, Placement), p
        validate(problem, p)
    return found


def declined(policy, problem: Problem) -> str:
    (only,) = policy.propose(problem)
    assert isinstance(only, Declined) and only.policy == policy.name
    return only.why


def singles(placement: Placement) -> list[int]:
    assert all(len(s) == 1 for s in placement.servers)
    return [s[0] for s in placement.servers]


# -- co-location -----------------------------------------------------------------------------------------


def decode_step() -> Making:
    m = Making()
    x = m.op(m.given(), m.weight(), us=1000, phase=Phase.DECODE)
    cache = m.given(KV)
    m.op(cache, x, name="aten::cat.default", leaves=True, phase=Phase.DECODE)
    return m


def test_a_decode_runs_where_its_cache_is() -> None:
    problem = decode_step().problem(where={-2: Where((0,)), -3: Where((1,))})
    (placement,) = proposals(Colocation(), problem)
    assert singles(placement) == [1, 1]
    assert "server 1" in placement.why


def test_a_request_without_state_goes_where_the_load_is_least_then_where_its_weights_are() -> None:
    m = Making()
    m.op(m.given(), m.weight(), us=1000)
    there = {-2: Where((1,))}
    cases = [((), there, 1), ((0, 0.1), there, 0), ((), {}, 0), ((0.1, 0), {}, 1)]
    for busy, where, server in cases:
        (placement,) = proposals(Colocation(), m.problem(pool(busy=busy), where=where))
        assert singles(placement) == [server], (busy, where)


def test_random_ops_and_state_on_another_server_leave_the_rest_where_it_is() -> None:
    m = Making()
    x = m.op(m.given(KV, (400, 250)), us=1000)
    m.op(x, name="aten::bernoulli.default", args=[["t"]])
    m.add(m.given(KV))
    problem = m.problem(pool(1, 1, 1), where={-1: Where((1,)), -2: Where((2,))})
    (placement,) = proposals(Colocation(), problem)
    assert singles(placement) == [1, 0, 2]


def test_a_sharded_cache_that_is_written_and_may_not_move_is_declined() -> None:
    m = Making()
    m.add(m.given(KV))
    where = {-1: Where((), Axis(0), (Shard(0, 0, 2), Shard(1, 2, 4)))}
    assert "writes to e0" in declined(Colocation(), m.problem(where=where))
    (placement,) = proposals(Colocation(), m.problem(where=where, movable={-1}))
    assert singles(placement) == [0]


def test_forced_colocation_is_on_the_server_of_its_label() -> None:
    problem = decode_step().problem(where={-2: Where((0,)), -3: Where((1,))})
    for server in (0, 1):
        (placement,) = proposals(Forced([Colocation()], "colocation", f"server {server}"), problem)
        assert (placement.policy, placement.label) == ("colocation", f"server {server}")
        assert singles(placement) == [server, server]


def test_what_is_not_proposed_cannot_be_forced() -> None:
    problem = decode_step().problem(where={-2: Where((0,)), -3: Where((1,))})
    for policy, label in (("prefill", "2 shards"), ("colocation", "server 7")):
        (placement,) = proposals(Forced([Colocation(), Prefill()], policy, label), problem)
        assert (placement.policy, placement.label) == ("colocation", "server 1")


# -- prefill ---------------------------------------------------------------------------------------------


def prefill(rows: int = 4, **more: object) -> Making:
    m = Making()
    x = m.given(shape=(rows, 250))
    x = m.op(x, m.weight((250, 250)), us=80_000, phase=Phase.PREFILL, shape=(rows, 250))
    m.op(x, name="aten::gelu.default", us=1000, phase=Phase.PREFILL, shape=(rows, 250), leaves=True)
    return m


def test_a_prefill_is_split_by_batch_in_proportion_to_speed() -> None:
    problem = prefill(9).problem(pool(1, 2), prove_batch=prove)
    (placement,) = proposals(Prefill(), problem)
    assert placement.split is not None
    assert placement.split.shards == (Shard(0, 0, 3), Shard(1, 3, 9))
    assert placement.servers == ((0, 1), (0, 1))
    plan = schedule(problem, [Colocation(), Prefill()])
    assert plan.placement == placement
    assert plan.busy_s == pytest.approx((0.027, 0.027))


def test_each_number_of_servers_is_an_alternative_the_fastest_first() -> None:
    problem = prefill(12).problem(pool(1, 3, 2), prove_batch=prove)
    two, three = proposals(Prefill(), problem)
    assert [s.server for s in two.split.shards] == [1, 2]
    assert [s.server for s in three.split.shards] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "seconds", "expected"),
    [(8, [1, 1], [4, 4]), (4, [1, 3], [3, 1]), (2, [1, 100], [1, 1]), (7, [1, 1, 2], [3, 3, 1])],
)
def test_rows_are_whole_and_everyone_has_one(rows, seconds, expected) -> None:
    assert proportional_rows(rows, seconds) == expected


def test_of_many_servers_not_every_number_is_tried() -> None:
    found = proposals(Prefill(), prefill(11).problem(pool(*[1.0] * 11), prove_batch=prove))
    assert [p.label for p in found] == [f"{k} shards" for k in (2, 3, 4, 8, 11)]
    even = proposals(Prefill(), prefill(4).problem(pool(1, 1, 1), prove_batch=prove))
    assert [p.label for p in even] == ["2 shards"], "2 + 1 + 1 rows take as long as 2 + 2"


def test_prefill_says_why_it_does_not_split() -> None:
    refusing = prefill().problem(prove_batch=lambda graph, externals: "instruction 7 mixes the rows")
    assert "instruction 7 mixes the rows" in declined(Prefill(), refusing)
    assert "two or more rows" in declined(Prefill(), prefill(1).problem(prove_batch=prove))
    assert "layouts" in declined(Prefill(), prefill().problem(prove_batch=prove, may_split_batch=False))
    assert "prove" in declined(Prefill(), prefill().problem())
    assert "one server" in declined(Prefill(), prefill().problem(pool(1), prove_batch=prove))
    assert "bandwidth" in declined(Prefill(), decode_step().problem(prove_batch=prove))
    m = Making()
    m.op(m.given(), us=1)
    assert "no compute-bound phase" in declined(Prefill(), m.problem(prove_batch=prove))


def caching(rows: int = 4, layers: int = 1, us: int = 8000) -> Making:
    """Each layer leaves a cache of 1000 bytes a row."""
    m = Making()
    x = m.given(shape=(rows, 250))
    for _ in range(layers):
        x = m.op(x, m.weight((250, 250)), us=us, phase=Phase.PREFILL, shape=(rows, 250))
        name = "aten::tanh.default"
        m.op(x, name=name, phase=Phase.PREFILL, shape=(rows, 250), leaves=True, residency=KV)
    return m


def test_a_split_prefill_pays_for_the_join_of_its_cache() -> None:
    problem = caching(12).problem(pool(1, 2), prove_batch=prove)
    (placement,) = proposals(Prefill(), problem)
    # 4 of 12 rows are not where most are: 0.5 ms of latency and 1 ms for 4000 bytes
    assert join_of_state(problem, placement) == Join(4000, pytest.approx(1.5e-3))
    with_overheads = caching(12, layers=2).problem(pool(1, 2, free=False), prove_batch=prove)
    (placement,) = proposals(Prefill(), with_overheads)
    # both caches: 2 x 1.5 on the link; for the receiver 0.1 to begin, and 2 x (0.2 + 1.0 to copy)
    assert join_of_state(with_overheads, placement) == Join(8000, pytest.approx(5.5e-3))
    plan = schedule(problem, [Prefill()])
    assert plan.join_s == pytest.approx(1.5e-3)
    assert "joined for the next window (0.0 MB, 1.50 ms)" in plan.placement.why
    assert plan.predicted_s == predict(problem, plan.placement, plan.transfers)[0]


def test_a_join_that_costs_more_than_the_split_saves_keeps_a_prefill_on_one_server() -> None:
    problem = caching(layers=6, us=1000).problem(pool(), prove_batch=prove)
    plan = schedule(problem, [Colocation(), Prefill()])
    # 0.5 + 4 + 6 on one server; split 0.5 + 2 + 3, and 6 x (0.5 + 0.5) to join
    assert plan.placement.policy == "colocation" and plan.predicted_s == pytest.approx(10.5e-3)
    (split,) = [d for d in plan.considered if d.policy == "prefill"]
    assert split.predicted_s == pytest.approx(5.5e-3)
    assert "11.50 ms (6.00 ms of it to join its state) against 10.50 ms" in split.why


def test_what_is_no_state_or_in_one_place_needs_no_join() -> None:
    problem = prefill(4).problem(pool(), prove_batch=prove)
    (placement,) = proposals(Prefill(), problem)
    assert join_of_state(problem, placement) == Join(0, 0.0)
    (whole,) = proposals(Colocation(), caching().problem())
    assert join_of_state(caching().problem(), whole) == Join(0, 0.0)


# -- branches --------------------------------------------------------------------------------------------


def two_towers(first_us: int, second_us: int) -> Making:
    m = Making()
    mask = m.op(m.given(), name="aten::gt.Scalar")
    ends = []
    for branch, us in enumerate((first_us, second_us)):
        x = m.op(m.given(), mask, us=us // 2, branch=branch)
        ends.append(m.op(x, m.weight(), us=us // 2, branch=branch, shape=(4, 250 * (branch + 1))))
    m.op(*ends, us=1000)
    return m


def test_towers_run_on_different_servers_and_join_where_more_bytes_are() -> None:
    problem = two_towers(80_000, 60_000).problem()
    (placement,) = proposals(Branches(), problem)
    assert placement.servers == ((0, 1), (0,), (0,), (1,), (1,), (1,))
    assert schedule(problem, [Colocation(), Branches()]).placement == placement


def test_of_unequal_devices_the_faster_has_the_longer_tower() -> None:
    (placement,) = proposals(Branches(), two_towers(80_000, 60_000).problem(pool(1, 2)))
    assert placement.servers[1:5] == ((1,), (1,), (0,), (0,))
    assert "on one server" in declined(Branches(), two_towers(80_000, 60_000).problem(pool(1, 9)))


def test_towers_that_are_not_there_or_cannot_be_joined_are_declined() -> None:
    assert "no two independent towers" in declined(Branches(), prefill().problem())
    assert "cannot reach" in declined(Branches(), two_towers(2, 2).problem(pool(peer=False)))


# -- pipelining ------------------------------------------------------------------------------------------


def stream(elements: int = 4, layers: int = 4, us: int = 10_000, weight=(4, 250)) -> Making:
    m = Making()
    weights = [m.weight(weight) for _ in range(layers)]
    ends = []
    for branch in range(elements):
        x = m.given()
        for w in weights:
            x = m.op(x, w, us=us, branch=branch)
        ends.append(x)
    m.op(*ends, name="aten::cat.default")
    return m


def by_label(found: list[Placement]) -> dict[str, Placement]:
    return {p.label: p for p in found}


def test_a_stream_is_dealt_or_flows_through_stages() -> None:
    problem = stream().problem()
    found = by_label(proposals(Pipelining(), problem))
    assert singles(found["elements dealt"]) == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0]
    assert singles(found["2 stages"]) == [0, 0, 1, 1] * 4 + [1]
    plan = schedule(problem, [Colocation(), Pipelining()])
    assert plan.placement.label == "elements dealt"  # no bubble at the start
    assert {d.label for d in plan.considered} == {"server 0", "2 stages"}


def test_stages_are_balanced_for_unequal_devices() -> None:
    found = by_label(proposals(Pipelining(), stream(layers=8).problem(pool(1, 3))))
    assert singles(found["2 stages"])[:8] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert singles(found["elements dealt"]).count(1) == 24 + 1


def test_memory_that_is_written_is_not_cut() -> None:
    m = Making()
    w = m.weight()
    for branch in range(2):
        x = m.op(m.given(), w, us=1000, branch=branch)
        x = m.op(x, w, us=1000, branch=branch)
        m.add(x, us=1000, branch=branch)
        m.op(x, w, us=1000, branch=branch)
    found = by_label(proposals(Pipelining(), m.problem()))
    assert singles(found["2 stages"])[:4] in ([0, 1, 1, 1], [0, 0, 0, 1])


def test_a_stream_whose_weights_fit_on_no_server_flows_through_stages_that_fit() -> None:
    problem = stream(layers=4, weight=(100, 250)).problem(pool(limits=(350_000, 350_000)))
    plan = schedule(problem, [Colocation(), Pipelining()])
    assert plan.placement.label == "2 stages"
    reasons = {d.label: d.why for d in plan.considered}
    assert "needs" in reasons["server 0"] and "needs" in reasons["elements dealt"]


def test_any_chain_whose_weights_fit_on_no_server_runs_in_stages_and_keeps_them() -> None:
    m = Making()
    x = m.given()
    for layer in range(6):
        x = m.op(x, m.weight((100, 250)), us=1000 * (1 + layer), name="aten::linear.default")
        m.op(m.given(KV), x, name="aten::cat.default", leaves=True)
    weights = [n.outputs[0] for n in m.externals if n.residency is Residency.PERSISTENT_WEIGHT]
    caches = [n.outputs[0] for n in m.externals if n.residency is KV]
    limits = (450_000, 450_000)
    plan = schedule(m.problem(pool(limits=limits)), [Colocation(), Pipelining()])
    assert plan.placement.label == "2 stages"
    stage = [s[0] for s in plan.placement.servers]
    assert stage == sorted(stage)
    assert all(4 >= stage[::2].count(s) >= 2 for s in (0, 1))
    # the next window finds weights and caches where this one left them
    where = {w: Where((stage[2 * k],)) for k, w in enumerate(weights)}
    where |= {c: Where((stage[2 * k + 1],)) for k, c in enumerate(caches)}
    held = [sum(100_000 for k in range(6) if stage[2 * k] == s) for s in (0, 1)]
    again = schedule(m.problem(pool(limits=limits, held=held), where=where), [Colocation(), Pipelining()])
    assert [s[0] for s in again.placement.servers] == stage
    assert not [t for t in again.transfers if t.once or t.value in caches]


def test_a_chain_that_fits_has_nothing_to_pipeline() -> None:
    assert "fit on one server" in declined(Pipelining(), prefill().problem(pool(limits=(10**9, 0))))
    assert "one server" in declined(Pipelining(), stream().problem(pool(1)))


def test_a_single_large_batch_of_a_cnn_is_split() -> None:
    m = Making()
    x = m.op(m.given(), m.weight((250, 250)), us=9000, phase=Phase.VISION_ENCODE, stage=0)
    m.op(x, name="aten::relu.default", us=1000, phase=Phase.VISION_ENCODE, stage=1)
    problem = m.problem(prove_batch=prove)
    (placement,) = proposals(Pipelining(), problem)
    assert placement.split is not None and placement.label == "2 shards"
    assert "pipelining" in declined(Prefill(), problem)


# -- round robin -----------------------------------------------------------------------------------------


def test_calls_take_turns() -> None:
    m = stream(elements=3, layers=2)
    problem = m.problem(calls=(0, 2, 4), turn=1)
    (placement,) = proposals(RoundRobin(), problem)
    assert singles(placement) == [1, 1, 0, 0, 1, 1, 1]


# -- real models -----------------------------------------------------------------------------------------


def resnet_stream() -> None:
    model = models.resnet18().to("genie")
    torch.cat([model(x.to("genie")) for x in torch.randn(4, 1, 3, 32, 32)]).cpu()


def clip() -> None:
    model = models.clip().to("genie")
    pixels, ids = torch.randn(2, 3, 32, 32).to("genie"), torch.randint(3, 500, (4, 16)).to("genie")
    image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    (image @ text.t()).cpu()


def generate() -> None:
    """Seeds in its first window, and asks at the end of each whether any sequence goes on."""
    model = models.gpt2().to("genie")
    prompt = torch.arange(5, 29).reshape(4, 6).to("genie")
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=3).cpu()


class Flops:
    """Time by arithmetic alone, large beside any move: every split that can be made pays."""

    def seconds(self, nodes, share=1.0):
        return [(n.cost.flops or 0) * share * 1e-6 for n in nodes]


def all_plans(graph):
    cluster = pool()
    cluster = replace(cluster, devices=tuple(replace(d, cost=Flops()) for d in cluster.devices))
    problem = Problem(graph, cluster, {}, prove_batch=prove)
    return problem, schedule(problem, [policy() for policy in BUILT_IN.values()])


def test_a_stream_through_resnet_is_pipelined() -> None:
    problem, plan = all_plans(largest(resnet_stream))
    assert plan.placement.policy == "pipelining"
    assert plan.predicted_s < 0.55 * sum(problem.seconds[0])
    staged = next(p for p in Pipelining().propose(problem) if p.label == "2 stages")
    assert isinstance(staged, Placement), "inplace activations leave places to cut"


def test_the_towers_of_clip_are_branches() -> None:
    problem, plan = all_plans(largest(clip))
    assert plan.placement.policy == "branches"
    towers = {n.branch: plan.placement.servers[n.number] for n in problem.graph.nodes}
    assert {towers[0], towers[1]} == {(0,), (1,)}


def test_gpt2_prefills_in_two_halves_and_decodes_in_one_place() -> None:
    found = [g for g in graphs_of(generate) if len(g.nodes) > 50]
    (_, first), *rest = [all_plans(g) for g in found]
    assert first.placement.policy == "prefill", first.considered
    assert first.placement.split.batch.size == 4
    assert first.placement.servers[-1] == (0,) and (0, 1) in first.placement.servers
    assert rest
    assert all(plan.placement.policy == "colocation" for _, plan in rest)
