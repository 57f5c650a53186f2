"""Turns between real processes: one works at a time, ABBA, and nobody waits for one that has ended."""

import subprocess
import sys

import pytest

from genie.bench.gate.turns import Turns

#: argv: address, name, rounds, shared file; writes its name when it has the turn, and again when it is done
PROCESS = """
import sys, time
from genie.bench.gate.turns import _Taker

address, name, rounds, path = sys.argv[1:]
taker = _Taker(address)
taker._cell = "cell"
for number in range(1, int(rounds) + 1):
    taker.take(3, number)
    with open(path, "a") as file:
        file.write(name)
        file.flush()
        time.sleep(0.02)
        file.write(name)
"""


@pytest.fixture
def play(tmp_path):
    """``play(a=4, b=2)``: the order in which processes of so many rounds had their turns."""

    def run(mirrored=False, **rounds):
        path = tmp_path / "order"
        with Turns(len(rounds), mirrored) as turns:
            started = [
                subprocess.Popen(
                    [sys.executable, "-c", PROCESS, turns.address(rank), name, str(count), str(path)]
                )
                for rank, (name, count) in enumerate(rounds.items())
            ]
            turns.serve(lambda: sum(process.poll() is None for process in started))
        assert all(process.returncode == 0 for process in started)
        return path.read_text()

    return run


def test_rounds_run_one_at_a_time_in_the_order_abba(play):
    assert play(a=4, b=4) == "aabb bbaa aabb bbaa".replace(" ", "")


def test_a_mirrored_pair_begins_with_the_other_side(play):
    assert play(mirrored=True, a=2, b=2) == "bbaaaabb"


def test_three_take_turns_too(play):
    assert play(a=2, b=2, c=2) == "aabbccccbbaa"


def test_nobody_waits_for_a_process_that_has_ended(play):
    assert play(a=3, b=1) == "aabbaaaa"
