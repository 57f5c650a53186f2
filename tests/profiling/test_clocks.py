"""A peer's clock is told within half a round trip, whatever its offset and rate."""

from __future__ import annotations

import random

from genie.profiling.clocks import ClockMap, Exchange, shortest


def exchange(now: int, offset: int, rate: float, rng: random.Random) -> Exchange:
    """Two ways that take unequal times, with a peer that runs ``rate`` times as fast."""
    there, back = rng.randint(10_000, 90_000), rng.randint(10_000, 90_000)
    return Exchange(now, offset + round((now + there) * rate), now + there + back)


def test_the_true_time_lies_within_the_stated_error_at_both_ends_and_between() -> None:
    rng = random.Random(0)
    for _ in range(200):
        offset, rate = rng.randint(-(10**15), 10**15), 1 + rng.uniform(-1e-4, 1e-4)
        begin, end = 10**12, 10**12 + 10**10
        clock = ClockMap(exchange(begin, offset, rate, rng), exchange(end, offset, rate, rng))
        for ours in range(begin, end, 10**9):
            peer = offset + round(ours * rate)
            assert abs(clock.to_ours(peer) - ours) <= clock.error + 2


def test_the_order_of_the_peers_times_is_kept() -> None:
    clock = ClockMap(Exchange(0, 500, 100), Exchange(10_000, 10_900, 10_100))
    times = [clock.to_ours(t) for t in range(0, 12_000)]
    assert times == sorted(times)


def test_the_shortest_exchange_is_kept() -> None:
    quick = Exchange(100, 7, 110)
    assert shortest([Exchange(0, 3, 50), quick, Exchange(200, 9, 260)]) is quick
    assert quick.error == 5 and quick.offset == 7 - 105


def test_without_an_exchange_at_the_end_the_first_offset_is_used() -> None:
    clock = ClockMap(Exchange(1000, 6010, 1020))
    assert clock.to_ours(9000) == 4000 and clock.error == 10
