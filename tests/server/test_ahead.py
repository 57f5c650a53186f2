"""Running ahead: the server does the next window before it is asked for; only the receipts show it."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from msgspec import structs

from genie.config import ENGINES
from genie.devices import device_slot
from genie.errors import OutOfMemoryError, ProtocolError, RemoteOpError
from genie.runtime.connection import fetched_tensors
from genie.runtime.server_process import ServerProcess
from genie.wire.messages import Configure, Counters, Execute, Load, Ping, Release, Upload
from genie.wire.vectors import Predictor, Vectors
from tests.server.programs import DEVICE, MEMORY_LIMIT, TOKEN, body, connect, dense, fetch, vector

SUM, PRODUCT, DRAW, IN_PLACE, PICK = range(5)
TWO = [["t"], ["t"]]
PROGRAMS = {
    SUM: body(("aten::add.Tensor", TWO, [-1, -2]), n_ext=2, kept=[0]),
    PRODUCT: body(("aten::mul.Tensor", TWO, [-1, -2]), n_ext=2, kept=[0], first_tid=1),
    DRAW: body(
        ("aten::rand_like.default", [["t"]], [-1]), ("aten::add.Tensor", TWO, [0, -2]),
        n_ext=2, kept=[1], first_tid=2,
    ),
    IN_PLACE: body(
        ("aten::add_.Tensor", TWO, [-2, -2], [0]), ("aten::mul.Tensor", TWO, [-1, -2]),
        n_ext=2, kept=[0], first_tid=4,
    ),
    PICK: body(
        ("aten::select.int", [["t"], ["i"], ["i"]], [-1]), ("aten::mul.Tensor", TWO, [0, -2]),
        n_ext=2, kept=[1], first_tid=6,
    ),
}  # fmt: skip
STEP, SCALE, START, OTHER = 1, 2, 3, 4
ELEMENTS = 1000
NBYTES = 4 * ELEMENTS
WAIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A server of this module's own, so that what it holds is known."""
    with ServerProcess.start(
        device_slot(DEVICE, 0),
        token=TOKEN,
        log_dir=tmp_path_factory.mktemp("server"),
        extra_args=["--memory-limit", str(MEMORY_LIMIT)],
    ) as process:
        yield process
        assert process.alive(), process.log_tail()


@pytest.fixture
def c(own):
    with connect(own) as connection:
        wait_for(connection, lambda load: load.sessions == 1)
        yield connection


def wait_for(c, true):
    deadline = time.monotonic() + WAIT_SECONDS
    while not true(load := c.request(Load())[0]):
        assert time.monotonic() < deadline, load


def upload(c, handle, value, elements=ELEMENTS):
    spec, data = dense(torch.full((elements,), float(value)))
    c.post(Upload(handle, spec), [data])


class Counting:
    """A client that counts up: its window is a quiet program that adds ``STEP`` to the last value, and one
    that multiplies the sum by ``SCALE`` and is read. The vectors travel as in a decode loop: not at all."""

    def __init__(self, c, run_ahead=1, elements=ELEMENTS):
        self.c = c
        if run_ahead:
            c.post(Configure([], run_ahead))
        for handle, value in ((STEP, 1), (SCALE, 2), (START, 0), (OTHER, 1000)):
            upload(c, handle, value, elements)
        self.value, self.product, self.base = START, OTHER + 1, 100
        self.ahead = self.missed = 0
        self._predictors: dict[int, Predictor] = {}

    def message(self, template, ext, releases=(), literals=(), **options) -> Execute:
        request = Execute("nonce", template=template, **options)
        if template not in self._predictors:
            self._predictors[template] = Predictor()
            # The one value that each keeps is bound to its base.
            request.body = structs.replace(PROGRAMS[template], names=vector("i", 0))
        vectors = Vectors(list(literals), [], list(ext), list(releases))
        request.vectors = self._predictors[template].encode(vectors, request.base)
        return request

    def add(self, step=STEP, template=SUM, **options) -> None:
        before, self.value = self.value, self.base
        request = self.message(
            template, [before, step], [before, self.product], base=self.base, quiet=True, **options
        )
        self.c.post(request)
        self.base += 20

    def read(self, scale=SCALE, template=PRODUCT, **options) -> float:
        self.product = self.value + 10
        request = self.message(
            template, [self.value, scale], base=self.product, fetch=[self.product], **options
        )
        return self.note(*self.c.request(request))

    def note(self, result, payload) -> float:
        for receipt in (*result.earlier, result.receipt):
            self.ahead += receipt.counters.get("ahead", 0)
            self.missed += receipt.counters.get("ahead_missed", 0)
        return fetched_tensors(result, payload)[0].flatten()[0].item()

    def pick(self, k) -> float:
        """``OTHER[k]`` times ``SCALE``."""
        self.product = self.value + 10
        request = self.message(PICK, [OTHER, SCALE], literals=[0, k], base=self.product, fetch=[self.product])
        return self.note(*self.c.request(request))

    def fetch(self, handle) -> float:
        return self.note(*self.c.request(Execute("fetch", fetch=[handle])))

    def window(self) -> float:
        self.add()
        return self.read()

    def run_up(self) -> float:
        """Windows until the next one has run ahead; returns the last value."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:  # after misses in a row it takes more windows
            read = self.window()
            if any(self.c.request(Load())[0].held_bytes == (5 + 2) * NBYTES for _ in range(20)):
                break
            assert time.monotonic() < deadline, "the next window does not run ahead"
        return read / 2


def test_what_is_foreseen_runs_before_it_is_asked_for(c):
    counting = Counting(c)
    assert [counting.window() for _ in range(40)] == [2.0 * (i + 1) for i in range(40)]
    counting.run_up()
    ahead = counting.ahead
    counting.window()
    assert counting.ahead == ahead + 2
    assert counting.missed == 0


def test_nothing_runs_ahead_unless_it_was_asked_for(c):
    counting = Counting(c, run_ahead=0)
    assert [counting.window() for _ in range(20)] == [2.0 * (i + 1) for i in range(20)]
    assert (counting.ahead, counting.missed) == (0, 0)


def other_operand(n):
    n.add(step=OTHER)
    return n.read(), 1000


def other_operand_of_the_second(n):
    n.add()
    return n.read(scale=OTHER) / 500, 1


def another_request(n):
    assert n.fetch(STEP) == 1
    return n.window(), 1


def an_upload(n):
    upload(n.c, STEP, 7)
    read = n.window()
    upload(n.c, STEP, 1)
    return read, 7


def an_upload_in_the_middle(n):
    n.add()
    upload(n.c, SCALE, 4)
    read = n.read()
    upload(n.c, SCALE, 2)
    return read / 2, 1


def a_release(n):
    n.c.post(Release([OTHER]))
    read = n.window()
    upload(n.c, OTHER, 1000)
    return read, 1


def another_base(n):
    n.base += 1000
    return n.window(), 1


def no_read_where_there_was_one(n):
    n.add()
    n.product = n.value + 10
    n.c.post(n.message(PRODUCT, [n.value, SCALE], base=n.product, quiet=True))
    return n.fetch(n.product), 1


def a_description(n):
    n.add()
    n.product = n.value + 10
    request = n.message(PRODUCT, [n.value, SCALE], base=n.product, fetch=[n.product], describe=[n.value])
    result, payload = n.c.request(request)
    assert result.described[0].shape == [ELEMENTS]
    return n.note(result, payload), 1


def an_input(n):
    spec, data = dense(torch.full((ELEMENTS,), 5.0))
    before, n.value, n.base = n.value, n.base, n.base + 20
    request = n.message(SUM, [before, 50], [before, n.product, 50], base=n.value, quiet=True)
    request.inputs = [(50, spec)]
    n.c.post(request, [data])
    return n.read(), 5


def another_program(n):
    n.add(step=SCALE, template=PRODUCT)
    return n.read(), None


def counters(n):
    assert n.c.request(Counters())[0].held_bytes == 5 * NBYTES, "as if nothing had run ahead"
    return n.window(), 1


@pytest.mark.parametrize(
    "deviation",
    [
        other_operand, other_operand_of_the_second, another_request, an_upload, an_upload_in_the_middle,
        a_release, another_base, no_read_where_there_was_one, a_description, an_input, another_program,
        counters,
    ],
)  # fmt: skip
def test_a_wrong_guess_changes_nothing(c, deviation):
    counting = Counting(c)
    for _ in range(3):
        value = counting.run_up()
        read, grown = deviation(counting)
        assert read == (2 * (value + grown) if grown is not None else 2 * 2 * value)
    counting.run_up()
    assert counting.missed == 3


def test_pings_do_not_disturb_what_ran_ahead(c):
    counting = Counting(c)
    value = counting.run_up()
    ahead = counting.ahead
    c.request(Ping())
    assert counting.window() == 2 * (value + 1)
    assert counting.ahead == ahead + 2


def test_after_one_wrong_guess_after_the_other_the_server_guesses_less(c):
    counting = Counting(c)
    for k in range(60):
        counting.add(step=STEP if k % 3 else OTHER)
        counting.read()
    # A guess is made after two windows alike: of three windows one would be foreseen, and never come.
    assert counting.missed <= 6


@pytest.mark.parametrize("template", [DRAW, IN_PLACE])
def test_what_draws_or_writes_does_not_run_ahead(c, template):
    counting = Counting(c)
    for _ in range(12):
        counting.add(template=template) if template == DRAW else counting.add()
        counting.read(template=template if template == IN_PLACE else PRODUCT)
    assert (counting.ahead, counting.missed) == (0, 0)
    if template == IN_PLACE:
        assert fetch(c, SCALE)[0][0].item() == 2.0 * 2**12


def test_random_numbers_go_on_as_without(own):
    drawn = []
    seed = body(("genie::manual_seed", [["i"]], [], []), n_ext=0, kept=[], first_tid=20)
    for run_ahead in (0, 1):
        with connect(own) as c:
            wait_for(c, lambda load: load.sessions == 1)
            counting = Counting(c, run_ahead)
            request = Execute("nonce", template=9, body=seed)
            request.vectors = Predictor().encode(Vectors([7]), 0)
            c.request(request)
            values = []
            for k in range(36):
                if k % 12 == 11:  # the server has just guessed that it goes on
                    counting.add(template=DRAW)
                else:
                    counting.add()
                values.append(counting.read())
                if run_ahead and k % 12 == 10:
                    wait_for(c, lambda load: load.held_bytes == 7 * NBYTES)
            drawn.append(values)
            assert bool(counting.ahead) == bool(run_ahead)
    assert drawn[0] == drawn[1]


def test_an_op_that_fails_ahead_fails_where_it_is_asked_for(own):
    told = []
    for run_ahead in (0, 1):
        with connect(own) as c:
            wait_for(c, lambda load: load.sessions == 1)
            counting = Counting(c, run_ahead)
            upload(c, OTHER, 3, elements=16)
            for k in range(16):
                counting.add()
                assert counting.pick(k) == 6
                if run_ahead and k >= 8:  # four are bound: the next sum has run
                    wait_for(c, lambda load: load.held_bytes > 5 * NBYTES)
            counting.add()
            with pytest.raises(RemoteOpError) as raised:
                counting.pick(16)
            told.append((str(raised.value).splitlines()[0], c.last_error.instruction))
            assert bool(counting.ahead) == bool(run_ahead)
            assert counting.fetch(counting.value) == 17
    assert told[0] == told[1]
    assert "out of range" in told[0][0] and told[0][1] == 0


def test_what_would_be_over_the_limit_does_not_run_ahead(c):
    """x and y are nearly half of it each: the next y fits only once the last one was released."""
    elements = MEMORY_LIMIT // 4 // 5 * 2
    counting = Counting(c, elements=1)
    for handle in (STEP, START, SCALE, OTHER):
        c.post(Release([handle]))
    upload(c, STEP, 1, elements)
    upload(c, SCALE, 2, 1)
    base, y = 100, START
    windows = 0
    while windows < 20 or (not counting.ahead and windows < 2000):
        windows += 1
        c.post(counting.message(PRODUCT, [SCALE, SCALE], [y], base=base, quiet=True))
        y = base + 1
        request = counting.message(SUM, [STEP, base], [base], base=y, fetch=[])
        request.describe = [y]
        result, _ = c.request(request)
        counting.ahead += result.receipt.counters.get("ahead", 0)
        base += 10
    assert fetch(c, y)[0][-1].item() == 5.0
    assert 0 < counting.ahead < windows, "the first of each window does, but not for ever"
    assert c.request(Counters())[0].held_bytes <= MEMORY_LIMIT
    with pytest.raises(OutOfMemoryError):
        upload(c, OTHER, 0, elements)
        c.request(Ping())


def test_what_ran_ahead_makes_room_for_what_is_asked_for(c):
    elements = MEMORY_LIMIT // 4 // 8
    counting = Counting(c, elements=elements)
    for _ in range(6):
        counting.window()
    wait_for(c, lambda load: load.held_bytes == 7 * 4 * elements)
    upload(c, 50, 3, elements)
    upload(c, 51, 3, elements)  # 5 that are bound, these, and what ran ahead would be 9 of 8
    assert fetch(c, 51)[0][0].item() == 3
    assert counting.window() == 2 * 7


@pytest.mark.parametrize("end", ["bye", "reset"])
def test_a_session_that_ends_ahead_leaves_nothing(own, end):
    with connect(own) as observer:
        wait_for(observer, lambda load: load.sessions == 1)
        with connect(own) as c:
            counting = Counting(c)
            for _ in range(6):
                counting.window()
            wait_for(observer, lambda load: load.held_bytes >= 6 * NBYTES)
            if end == "reset":
                c._channel.abort()
        wait_for(observer, lambda load: load.sessions == 1 and load.held_bytes == 0)


def test_two_sessions_run_ahead_at_once(own):
    reads: dict[int, list[float]] = {}
    ahead = []

    def run(k):
        with connect(own) as c:
            counting = Counting(c)
            reads[k] = [counting.window() for _ in range(200)]
            ahead.append(counting.ahead)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counted = [2.0 * (i + 1) for i in range(200)]
    assert reads == {0: counted, 1: counted}
    assert all(ahead)


def test_a_server_that_stops_ahead_stops_cleanly(tmp_path):
    with ServerProcess.start(device_slot(DEVICE, 0), token=TOKEN, log_dir=tmp_path) as process:
        with connect(process) as c:
            counting = Counting(c)
            for _ in range(20):
                counting.window()
            process.close()
        tail = process.log_tail()
    assert "stopped" in tail and "Traceback" not in tail, tail


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        (Configure(["graph", "warp"], 0), f"no engine warp: choose from {', '.join(ENGINES)}"),
        (Configure([], 2), "0 to 1 windows ahead, not 2"),
        (Configure([], -1), "0 to 1 windows ahead"),
    ],
)
def test_what_the_server_cannot_do_is_refused(c, asked, remedy):
    c.post(asked)
    with pytest.raises(ProtocolError, match=remedy):
        c.request(Ping())
    c.request(Ping())
    counting = Counting(c, run_ahead=0)
    assert [counting.window() for _ in range(12)][-1] == 24.0
    assert counting.ahead == 0
