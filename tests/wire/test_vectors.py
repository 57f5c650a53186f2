"""Vectors of a template: any sequence of them survives, and an even one costs nothing."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genie.errors import ProtocolError
from genie.wire.vectors import Predictor, Vectors, whole

EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62)]
int64 = st.one_of(st.sampled_from(EDGES), st.integers(-4, 4), st.integers(-(2**63), 2**63 - 1))
float64 = st.one_of(
    st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf")]),
    st.binary(min_size=8, max_size=8).map(lambda b: struct.unpack("<d", b)[0]),
)
vectors = st.builds(
    Vectors,
    st.lists(int64, max_size=6),
    st.lists(float64, max_size=3),
    st.lists(int64, max_size=6),
    st.lists(int64, max_size=4),
)
#: what else may come between two vectors of a sequence
bases = st.one_of(st.integers(0, 2000), st.sampled_from([-(2**63), 2**63 - 1, 2**64 - 1]))


def bits(v: Vectors) -> tuple:
    return list(v.literals), struct.pack(f"<{len(v.floats)}d", *v.floats), list(v.ext), list(v.releases)


def pair() -> tuple[Predictor, Predictor]:
    return Predictor(), Predictor()


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[Vectors, int]]:
    """Steps that keep lengths and change some values, mixed with arbitrary ones."""
    steps = [(draw(vectors), draw(bases))]
    for _ in range(draw(st.integers(0, 8))):
        previous = steps[-1][0]
        if draw(st.booleans()):
            steps.append((draw(vectors), draw(bases)))
            continue
        changed = [list(part) for part in previous]
        for part, value in ((0, int64), (1, float64), (2, int64), (3, int64)):
            for i in range(len(changed[part])):
                if draw(st.integers(0, 3)) == 0:
                    changed[part][i] = draw(value)
        changed[3] = changed[3][: draw(st.integers(0, 4))] + draw(st.lists(int64, max_size=2))
        steps.append((Vectors(*changed), draw(bases)))
    return steps


@settings(max_examples=400, deadline=None)
@given(sequences())
def test_any_sequence_arrives_bit_for_bit(steps):
    sender, receiver = pair()
    for values, base in steps:
        assert bits(receiver.decode(sender.encode(values, base), base)) == bits(values)


@settings(max_examples=400, deadline=None)
@given(sequences(), vectors, bases, st.data())
def test_a_residual_that_is_refused_changes_nothing(steps, values, base, data):
    sender, receiver = pair()
    for v, b in steps:
        receiver.decode(sender.encode(v, b), b)
    junk = data.draw(
        st.one_of(
            st.binary(min_size=1, max_size=80),
            st.builds(
                lambda head, tail: struct.pack("<5I", *head) + tail,
                st.lists(st.one_of(st.integers(0, 4), st.just(2**32 - 1)), min_size=5, max_size=5),
                st.binary(max_size=60),
            ),
        )
    )
    try:
        Predictor.decode(receiver, junk, base)
    except ProtocolError:
        assert bits(receiver.decode(sender.encode(values, base), base)) == bits(values)


@given(
    st.lists(st.tuples(int64, st.integers(-5, 5)), max_size=20),
    st.lists(float64, max_size=4),
    st.lists(st.integers(-1000, 1000), max_size=20),
    st.integers(1, 600),
)
def test_even_growth_costs_nothing_from_the_third_time_on(growing, floats, offsets, step):
    sender, receiver = pair()
    for k in range(6):
        values = Vectors(
            [(v + k * d + 2**63) % 2**64 - 2**63 for v, d in growing],
            floats,
            [-7, *(10_000 + k * step + o for o in offsets)],
            [9_000 + k * step],
        )
        residual = sender.encode(values, k * step)
        assert k < 2 or residual == b""
        assert bits(receiver.decode(residual, k * step)) == bits(values)


def test_handles_follow_a_base_that_moves_unevenly():
    sender, receiver = pair()
    for k, base in enumerate(itertools.accumulate([100, 480, 480, 700, 480, 1, 3000])):
        values = Vectors([5], [0.5], [-3, 17, base - 1, base - 200], [base - 90])
        residual = sender.encode(values, base)
        assert k < 2 or residual == b""
        assert bits(receiver.decode(residual, base)) == bits(values)


def test_one_changed_value_costs_its_own_bytes():
    sender, receiver = pair()
    numbers = list(range(1000))
    receiver.decode(sender.encode(Vectors(numbers), 0), 0)
    numbers[500] = -1
    residual = sender.encode(Vectors(numbers), 0)
    assert len(residual) == 20 + 4 + 8
    assert list(receiver.decode(residual, 0).literals) == numbers


def test_a_release_more_or_less_costs_only_itself():
    sender, receiver = pair()
    for count, most in ((10, 120), (12, 44), (11, 20), (11, 0)):
        values = Vectors((), (), (), list(range(count)))
        residual = sender.encode(values, 0)
        assert len(residual) <= most
        assert list(receiver.decode(residual, 0).releases) == list(range(count))


def test_all_values_changed_cost_no_more_than_the_values():
    rng = random.Random(0)
    sender = Predictor()
    sizes = [
        len(sender.encode(Vectors([rng.randrange(-(2**63), 2**63) for _ in range(100)]), 0)) for _ in range(5)
    ]
    assert sizes == [820] * 5


def test_unchanged_floats_are_compared_by_bits():
    quiet, other = struct.unpack("<2d", struct.pack("<2Q", 0x7FF8 << 48, 0x7FF80001 << 32))
    sender = Predictor()
    sender.encode(Vectors((), [quiet, 0.0]), 0)
    assert sender.encode(Vectors((), [quiet, 0.0]), 0) == b""
    assert len(sender.encode(Vectors((), [other, 0.0]), 0)) > 0
    assert len(sender.encode(Vectors((), [other, -0.0]), 0)) > 0


def test_an_int_that_does_not_fit_is_refused_and_changes_nothing():
    sender, receiver = pair()
    receiver.decode(sender.encode(Vectors([1]), 0), 0)
    with pytest.raises(OverflowError, match="64 bits"):
        sender.encode(Vectors([2**63]), 0)
    assert list(receiver.decode(sender.encode(Vectors([2]), 0), 0).literals) == [2]


def test_a_whole_vector_needs_no_history():
    receiver = Predictor()
    values = Vectors([1, 2], [0.5], [3], [4, 5])
    receiver.decode(whole(Vectors([9])), 0)
    assert bits(receiver.decode(whole(values), 0)) == bits(values)


def head(*numbers: int) -> bytes:
    return struct.pack("<5I", *numbers)


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        (b"123", "too few for its head"),
        (head(1, 0, 0, 0, 2**32 - 1), "0 bytes after its head"),
        (head(2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), "0 bytes after its head"),
        (head(2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0), "came with only 0"),
        (head(2, 0, 0, 2**32 - 3, 0), "came with only 0"),
        (head(2, 0, 0, 0, 1) + bytes(11), "11 bytes after its head"),
        (head(2, 0, 0, 0, 1) + struct.pack("<Iq", 2, 5), "leave it"),
        (head(2, 0, 0, 0, 2) + struct.pack("<IIqq", 1, 1, 5, 5), "not ascending"),
        (head(2, 0, 0, 0, 2) + struct.pack("<IIqq", 1, 0, 5, 5), "not ascending"),
        (head(2, 0, 0, 1, 1) + struct.pack("<Iq", 0, 5), "came with only 1"),
        (head(0, 0, 1, 1, 1) + struct.pack("<Iq", 0, 5), "came with only 1"),
    ],
)
def test_a_malformed_residual_is_a_protocol_error(residual, text):
    receiver = Predictor()
    receiver.decode(whole(Vectors([1, 2])), 0)
    with pytest.raises(ProtocolError, match=text):
        receiver.decode(residual, 0)
    assert list(receiver.decode(b"", 0).literals) == [1, 2]
