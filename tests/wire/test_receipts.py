"""Brief receipts: whatever is left out, the client gets back what the server wrote."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genie.errors import ProtocolError
from genie.wire.messages import BriefReceipt, ProgramReceipt
from genie.wire.receipts import Abridger, Completer

PID, DEVICE = 4242, "cpu:0 a test"


def late(receipt: ProgramReceipt) -> Callable[[], ProgramReceipt]:
    return lambda: receipt


def receipt(template: int, generation: int = 0, nonce: str = "n", counters=None) -> ProgramReceipt:
    work = (0, b"") if template < 0 else (template + 1, bytes([template, generation]) * 16)
    return ProgramReceipt(PID, DEVICE, nonce, *work, 1.5, 0.25, counters or {})


def test_what_was_told_is_not_told_again():
    server, client = Abridger(), Completer(PID, DEVICE)
    server.keep(0, late(receipt(0)))
    first = server.take({0}, "n")
    server.keep(0, late(receipt(0)))
    second = server.take({0}, "n")
    assert first[0].work == (1, bytes(32)) and second[0].work is None and second[0].nonce is None
    assert client.complete(first, "n") == client.complete(second, "n") == [receipt(0)]


def test_a_receipt_lost_with_a_failed_request_does_not_count_as_told():
    server = Abridger()
    server.keep(0, late(receipt(0)))
    server.drop()
    server.keep(0, late(receipt(0)))
    assert server.take({0})[0].work is not None


def test_a_digest_that_was_never_told_is_a_protocol_error():
    with pytest.raises(ProtocolError, match="never told"):
        Completer(PID, DEVICE).complete([BriefReceipt(3, 1, 1)])


#: what a client does next: run a program quietly or not, read one reply more, begin a new request
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["quiet", "awaited", "failing"]), st.integers(-1, 5)),
        st.tuples(st.just("read"), st.just(0)),
        st.tuples(st.just("begin"), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=500, deadline=None)
@given(steps, st.integers(1, 3))
def test_every_receipt_arrives_through_evictions_failures_and_replies_on_their_way(steps, limit):
    """The client holds ``limit`` templates; the server answers at once, the client reads later."""
    server, client = Abridger(), Completer(PID, DEVICE)
    known: dict[int, int] = {}  # the client's templates, by program: their numbers
    live: set[int] = set()
    generations = itertools.count()
    expected: list[ProgramReceipt] = []
    replies: list[tuple[list[BriefReceipt], list[ProgramReceipt], str]] = []
    asked = read = 0
    nonce = "0"

    def read_one() -> None:
        nonlocal read
        brief, wanted, own = replies.pop(0)
        read += 1
        assert client.complete(brief, own) == wanted
        client.replied(read)

    for kind, program in steps:
        if kind == "read":
            if replies:
                read_one()
            continue
        if kind == "begin":
            nonce = str(int(nonce) + 1)
            continue
        template = -1
        if program >= 0:
            template = known.pop(program, -1)
            if template < 0:
                template = next(generations)
                live.add(template)
            known[program] = template
            if len(known) > limit:
                evicted = known.pop(next(iter(known)))
                client.evict(evicted, asked + 1)
                live.discard(evicted)
                server.forget([evicted])
        done = receipt(template, nonce=nonce, counters={"stateless": 1} if program == 2 else None)
        if kind == "quiet":
            server.keep(template, late(done))
            expected.append(done)
            continue
        asked += 1
        if kind == "failing":
            server.drop()
            replies.append(([], [], ""))
        else:
            replies.append((server.take(live, nonce), expected, nonce))
        expected = []
    while replies:
        read_one()
    assert client.complete(server.take(live)) == expected
    assert len(server._told) <= limit
