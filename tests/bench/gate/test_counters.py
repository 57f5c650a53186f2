"""Wire counters are gated exactly, more as well as less; what servers count is shown."""

from genie.bench.gate.counters import gated_changes, shown_counters
from tests.bench.gate.inputs import CASE_BYTES, cell, result


def one(**more):
    (found,) = result(cell(**more)).cells.values()
    return found


def test_equal_counters_are_no_change():
    assert gated_changes([one()] * 3, [one(seconds=0.5)] * 3) == ()


def test_more_and_less_are_both_changes():
    (more,) = gated_changes([one()], [one(wire={"bytes_in": 1001})])
    (less,) = gated_changes([one()], [one(wire={"round_trips": 8})])
    assert str(more) == "bytes_in 1000 -> 1001"
    assert str(less) == "round_trips 9 -> 8 (less)"
    assert (more.better, less.better) == (False, True)


def test_a_counter_that_differs_between_processes_of_one_side_cannot_be_gated():
    (change,) = gated_changes([one(), one()], [one(), one(wire={"bytes_out": 1004})])
    assert not change.stable
    assert str(change) == (
        "bytes_out is not deterministic, so it cannot be gated: old 1000, new 1000 to 1004 (2 values)"
    )


def test_an_unstable_counter_is_a_finding_though_both_sides_saw_the_same_values():
    runs = [one(), one(wire={"bytes_out": 1004})]
    assert len(gated_changes(runs, runs)) == 1


def test_bytes_of_single_cases_count_too():
    old = one(workload="ops", cases={"matmul": 1.0})
    new = one(workload="ops", cases={"matmul": 1.0})
    new.info["cases"]["matmul"] |= {"bytes_out": 2} | {"bytes_in": CASE_BYTES["bytes_in"]}
    assert [str(change) for change in gated_changes([old], [new])] == ["bytes_out of matmul 1 -> 2"]


def test_peers_are_not_gated():
    peer = {"round_trips": None, "bytes_out": 5}
    assert gated_changes([one(wire=peer)], [one(wire=peer | {"bytes_out": 6})]) == ()


def test_a_local_baseline_that_begins_to_send_is_a_change():
    (change,) = gated_changes(
        [one(baseline="local_pytorch")], [one(baseline="local_pytorch", wire={"bytes_out": 1})]
    )
    assert str(change) == "bytes_out 0 -> 1"


def test_counters_of_engines_and_cpu_time_are_only_shown():
    old, new = one(), one(receipts=[{"counters": {"stateless": 1}}, {"counters": {"stateless": 2}}])
    new.info["wire"]["peer_bytes"] = 77
    assert gated_changes([old], [new]) == ()
    shown = {counter.counter: (counter.old, counter.new) for counter in shown_counters([old], [new])}
    assert shown["stateless"] == (1, 3)
    assert shown["peer_bytes"] == (0, 77)
    assert shown["ops"] == (50, 50)
    assert shown["client CPU s"] == (0.1, 0.1)
