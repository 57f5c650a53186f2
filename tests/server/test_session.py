"""What a session answers: results, receipts, errors that poison, memory that is freed."""

from __future__ import annotations

import os
import struct
import time

import pytest
import torch

from genie.device_facts import DeviceFacts
from genie.errors import OutOfMemoryError, ProtocolError, RemoteOpError, UnsupportedOpError
from genie.runtime.connection import fetched_tensors
from genie.server.device import Device
from genie.server.execute import Executor
from genie.server.faults import Fault
from genie.server.store import HandleStore
from genie.wire.digest import digest as digest_of
from genie.wire.framing import EMPTY
from genie.wire.messages import (
    MAX_LANES,
    Adopt,
    Counters,
    Execute,
    Offer,
    OpDef,
    Ping,
    Release,
    TensorSpec,
    Upload,
)
from genie.wire.vectors import Predictor, Vectors
from tests.server.programs import (
    ADD,
    DEVICE,
    DOUBLE,
    MEMORY_LIMIT,
    SCALE_IN_PLACE,
    body,
    connect,
    dense,
    execute,
    fetch,
    floats,
    vector,
)


def upload(c, handle, tensor, digest=False):
    spec, data = dense(tensor)
    c.post(Upload(handle, spec, digest_of(data) if digest else None), [data])


def test_a_program_runs_and_its_receipt_says_so(connection):
    upload(connection, 1, floats(1, 2, 3))
    request = execute(0, DOUBLE, ext=[1], base=100, fetch=[100], describe=[100], nonce="n-17")
    result, payload = connection.request(request)
    assert fetched_tensors(result, payload)[0].tolist() == [2, 4, 6]
    assert result.described == [TensorSpec("float32", [3], [1])]
    receipt = result.receipt
    assert (receipt.nonce, receipt.ops) == ("n-17", 1)
    assert receipt.pid == connection.welcome.pid != os.getpid()
    assert receipt.device == connection.welcome.device
    assert len(receipt.digest) == 32
    assert receipt.remote_ms > 0


def test_one_template_serves_many_literals(connection):
    upload(connection, 1, floats(1, 2))
    connection.request(execute(0, SCALE_IN_PLACE, ext=[1], literals=[3]))
    connection.request(execute(0, ext=[1], literals=[5]))
    assert fetch(connection, 1)[0].tolist() == [15, 30]


def test_inputs_release_and_release_after(connection):
    spec, data = dense(floats(1, 2))
    request = execute(0, DOUBLE, ext=[5], base=10, inputs=[(5, spec)], fetch=[10], releases=[5, 10])
    result, payload = connection.request(request, [data])
    assert fetched_tensors(result, payload)[0].tolist() == [2, 4]
    assert connection.request(Counters())[0].handles == 0
    upload(connection, 6, floats(1))
    connection.request(Execute("n", release=vector("q", 6)))
    with pytest.raises(ProtocolError, match="handle 6 is not bound"):
        fetch(connection, 6)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "bfloat16", "float64", "complex64"])
def test_every_dtype_survives_the_way_there_and_back(connection, dtype):
    kind = getattr(torch, dtype)
    for tensor in (torch.tensor(1).to(kind), torch.arange(24).reshape(2, 3, 4).to(kind).permute(2, 0, 1)):
        upload(connection, 1, tensor)
        back = fetch(connection, 1)[0]
        assert torch.equal(back, tensor)
        assert back.stride() == tensor.stride()


def test_views_and_empty_tensors_come_back(connection):
    upload(connection, 1, torch.arange(12.0).reshape(3, 4))
    upload(connection, 2, torch.empty(0, 4))
    column = body(("aten::select.int", [["t"], ["i"], ["i"]], [-1]), n_ext=1, kept=[0])
    result, payload = connection.request(
        execute(0, column, ext=[1], literals=[1, 2], base=10, fetch=[10, 2], describe=[10])
    )
    picked, empty = fetched_tensors(result, payload)
    assert picked.tolist() == [2, 6, 10]
    assert empty.shape == (0, 4)
    assert result.described == [TensorSpec("float32", [3], [4], 2)]


def test_wrong_vectors_are_refused_and_the_session_goes_on(connection):
    upload(connection, 1, floats(1))
    connection.request(execute(0, SCALE_IN_PLACE, ext=[1], literals=[2]))
    for wrong in (
        execute(0, ext=[1]),
        execute(0, ext=[1, 1], literals=[2]),
        Execute("n", template=0, vectors=b"123"),
        execute(7, ext=[1], literals=[2]),
        execute(0, SCALE_IN_PLACE, ext=[1], literals=[2]),
    ):
        with pytest.raises(ProtocolError):
            connection.request(wrong)
    assert fetch(connection, 1)[0].tolist() == [2]


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("float32", [-1], [1]),
        TensorSpec("float32", [4], [-1]),
        TensorSpec("float32", [2, 2], [1]),
        TensorSpec("float32", [4], [1], 1),
        TensorSpec("float32", [2**62], [1]),
        TensorSpec("float32", [2**40, 2**40], [2**40, 1]),
        TensorSpec("float32", [4], [2]),
        TensorSpec("float32", [5], [1]),
        TensorSpec("object", [4], [1]),
        TensorSpec("float32", [4], [1], 0, 3),
    ],
    ids=str,
)
def test_impossible_geometry_is_refused_and_the_session_goes_on(connection, spec):
    data = floats(1, 2, 3, 4).numpy()
    connection.post(Upload(1, spec), [data])
    with pytest.raises(ProtocolError):
        connection.request(Ping())
    with pytest.raises(ProtocolError):
        connection.request(Execute("n", inputs=[(2, spec)]), [data])
    with pytest.raises(ProtocolError):
        fetch(connection, 1)
    assert connection.request(Ping())


def test_storages_bound_what_inputs_may_reach(connection):
    data = floats(1, 2, 3, 4).numpy()
    inside = TensorSpec("float32", [2], [2], 1, 0)
    result, payload = connection.request(Execute("n", inputs=[(1, inside)], storages=[16], fetch=[1]), [data])
    assert fetched_tensors(result, payload)[0].tolist() == [2, 4]
    outside = TensorSpec("float32", [2], [2], 2, 0)
    with pytest.raises(ProtocolError, match="leaves its storage"):
        connection.request(Execute("n", inputs=[(1, outside)], storages=[16]), [data])
    with pytest.raises(ProtocolError, match="payload has 16 bytes"):
        connection.request(Execute("n", inputs=[(1, inside)], storages=[32]), [data])


def test_a_failed_op_is_named_and_poisons_what_it_was_to_make(connection):
    upload(connection, 1, floats(1, 2))
    upload(connection, 2, floats(1, 2, 3))
    bad = body(ADD, ("aten::add.Tensor", [["t"], ["t"]], [0, -2]), n_ext=2, kept=[1])
    with pytest.raises(RemoteOpError, match=r"aten::add.Tensor.*instruction 1"):
        connection.request(execute(0, bad, ext=[1, 2], base=50, nonce="first"))
    assert connection.last_error.instruction == 1
    with pytest.raises(RemoteOpError, match=r"aten::add.Tensor.*instruction 1"):
        fetch(connection, 51)
    assert (connection.last_error.nonce, connection.last_error.instruction) == ("first", 1)
    with pytest.raises(RemoteOpError, match="instruction 1"):
        connection.request(execute(1, body(ADD, n_ext=1, kept=[0], first_tid=9), ext=[51], base=60))
    with pytest.raises(RemoteOpError, match="instruction 1"):
        fetch(connection, 60)
    assert fetch(connection, 1)[0].tolist() == [1, 2]


def test_a_one_way_failure_answers_the_next_request_and_poisons_its_handle(connection):
    connection.post(Adopt(1, TensorSpec("float32", [4], [1]), b"x" * 32))
    connection.post(Release([99]))
    with pytest.raises(ProtocolError, match="no content"):
        connection.request(execute(0, DOUBLE, ext=[1], base=10))
    assert connection.request(Ping())
    with pytest.raises(ProtocolError, match="no content"):
        fetch(connection, 10)
    with pytest.raises(ProtocolError, match="no content"):
        fetch(connection, 1)
    upload(connection, 1, floats(4))
    result, payload = connection.request(execute(0, ext=[1], base=10, fetch=[10]))
    assert fetched_tensors(result, payload)[0].tolist() == [8]


def test_disallowed_ops_do_not_run_and_other_definitions_hold(connection):
    upload(connection, 1, floats(1))
    for k, op in enumerate(
        ("aten::from_file", "aten::set_.source_Tensor", "prim::Print", "os::system", "aten::")
    ):
        evil = body((op, [["t"]], [-1]), n_ext=1, kept=[0], first_tid=10 * k)
        evil.defs.append(OpDef(10 * k + 1, "aten::add.Tensor", [["t"], ["t"]], {}, [-1]))
        with pytest.raises(UnsupportedOpError):
            connection.request(execute(k, evil, ext=[1], base=10))
        with pytest.raises(UnsupportedOpError):
            connection.request(execute(k, ext=[1], base=10))
    known = body(ADD, n_ext=1, kept=[0], first_tid=1)
    known.defs.clear()
    assert connection.request(execute(50, known, ext=[1], base=20, fetch=[20]))


def test_over_quota_names_the_option_and_the_session_goes_on(connection):
    spec = TensorSpec("uint8", [MEMORY_LIMIT + 1], [1])
    connection.post(Upload(1, spec), [torch.zeros(MEMORY_LIMIT + 1, dtype=torch.uint8).numpy()])
    with pytest.raises(OutOfMemoryError, match="--memory-limit"):
        connection.request(Ping())
    half = torch.zeros(MEMORY_LIMIT // 2, dtype=torch.uint8)
    upload(connection, 2, half)
    grow = body(("aten::cat", [["tl", 2], ["i"]], [-1, -1]), n_ext=1, kept=[0])
    with pytest.raises(OutOfMemoryError, match="--memory-limit"):
        connection.request(execute(0, grow, ext=[2], literals=[0], base=10))
    assert connection.request(Counters())[0].held_bytes == MEMORY_LIMIT // 2


@pytest.mark.parametrize("size", [2**50, 2**62])
def test_an_allocation_that_fails_is_out_of_memory(connection, size):
    zeros = body(("aten::zeros", [["il", 1]], []), n_ext=0, kept=[0])
    with pytest.raises(OutOfMemoryError, match="aten::zeros"):
        connection.request(execute(0, zeros, literals=[size], base=1))
    assert connection.request(Ping())


def test_contents_are_shared_between_sessions_and_private_when_written(server, connection):
    weights = torch.arange(1000.0)
    spec, data = dense(weights)
    digest = digest_of(data)
    assert connection.request(Offer([digest], [4000]))[0].missing == [0]
    upload(connection, 1, weights, digest=True)
    with connect(server) as other:
        assert other.request(Offer([digest, b"?" * 32], [4000, 4]))[0].missing == [1]
        other.post(Adopt(7, spec, digest))
        assert torch.equal(fetch(other, 7)[0], weights)
        view = body(
            ("aten::slice.Tensor", [["t"], ["i"], ["i"], ["i"]], [-1]), n_ext=1, kept=[0], first_tid=5
        )
        other.request(execute(1, view, ext=[7], literals=[0, 10, 20], base=100))
        result, _ = other.request(execute(0, SCALE_IN_PLACE, ext=[100], literals=[2]))
        assert result.receipt.counters["private_copies"] == 1
        mine, sliced = fetch(other, 7, 100)
        assert sliced.tolist() == [2 * i for i in range(10, 20)]
        assert torch.equal(mine[10:20], sliced)
        assert other.request(Counters())[0].held_bytes == 4000
    assert torch.equal(fetch(connection, 1)[0], weights)


def test_a_wrong_digest_is_refused(connection):
    spec, data = dense(floats(1, 2))
    connection.post(Upload(1, spec, b"\0" * 32), [data])
    with pytest.raises(ProtocolError, match="do not have the digest"):
        connection.request(Ping())


def test_offered_content_waits_for_its_adoption(server, connection):
    tensor = torch.arange(77.0)
    spec, data = dense(tensor)
    digest = digest_of(data)
    with connect(server) as first:
        upload(first, 1, tensor, digest=True)
        assert first.request(Ping())
        assert connection.request(Offer([digest], [spec.shape[0] * 4]))[0].missing == []
    connection.post(Adopt(1, spec, digest))
    assert torch.equal(fetch(connection, 1)[0], tensor)


def test_a_session_that_ends_frees_everything(server, connection):
    tensor = torch.arange(55.0)
    _, data = dense(tensor)
    digest = digest_of(data)
    with connect(server) as first:
        upload(first, 1, tensor, digest=True)
        first.request(execute(0, DOUBLE, ext=[1], base=10))
        assert first.request(Counters())[0].held_bytes == 2 * 55 * 4
    deadline = time.monotonic() + 10  # the session's own thread frees it, in its own time
    while True:
        with connect(server) as probe:  # an offer that hits reserves the content for the asking session
            if probe.request(Offer([digest], [220]))[0].missing:
                break
        assert time.monotonic() < deadline, "the content of an ended session is still there"
        time.sleep(0.05)


def test_the_digest_tells_programs_apart_and_is_the_same_in_every_session(server, connection):
    upload(connection, 1, floats(1))
    with connect(server) as other:
        upload(other, 1, floats(2))
        here = connection.request(execute(0, DOUBLE, ext=[1], base=10))[0].receipt.digest
        there = other.request(execute(4, DOUBLE, ext=[1], base=10))[0].receipt.digest
        scale = body(("aten::mul_.Scalar", [["t"], ["i"]], [-1], [0]), n_ext=1, kept=[], first_tid=1)
        different = other.request(execute(5, scale, ext=[1], literals=[1]))[0].receipt.digest
    assert here == there != different


def test_random_numbers_belong_to_the_session(server, connection):
    seed = body(("genie::manual_seed", [["i"]], [], []), n_ext=0, kept=[])
    draw = body(("aten::rand", [["il", 1]], []), n_ext=0, kept=[0], first_tid=5)

    def start(c):
        c.request(execute(0, seed, literals=[1234]))
        c.request(execute(1, draw, literals=[4], base=10))

    with connect(server) as other:
        start(connection)
        start(other)
        results = [
            fetched_tensors(*c.request(execute(1, literals=[4], base=20, fetch=[10, 20])))
            for c in (connection, other)
        ]
    generator = torch.Generator(DEVICE).manual_seed(1234)
    expected = [torch.rand(4, generator=generator, device=DEVICE).cpu() for _ in range(2)]
    for result in results:
        assert all(map(torch.equal, result, expected))


def test_templates_can_be_evicted_and_sent_again(connection):
    upload(connection, 1, floats(1))
    connection.request(execute(0, DOUBLE, ext=[1], base=10))
    with pytest.raises(ProtocolError, match="never sent"):
        connection.request(execute(0, ext=[1], base=10, evict=[0]))
    assert connection.request(Counters())[0].templates == 0


def predicted(predictor, template, program=None, *, ext=(), literals=(), base=0, **options):
    residual = predictor.encode(Vectors(literals, (), ext, ()), base)
    return Execute("n", template=template, body=program, vectors=residual, base=base, **options)


def test_vectors_stay_predictable_through_programs_that_fail(connection):
    upload(connection, 1, floats(1, 2))
    upload(connection, 2, floats(1, 2, 3))
    predictor = Predictor()
    program = body(
        ("aten::add.Tensor", [["t"], ["t"]], [-1, -2]), ("aten::mul.Scalar", [["t"], ["i"]], [0]),
        n_ext=2, kept=[1],
    )  # fmt: skip
    connection.request(predicted(predictor, 0, program, ext=[1, 1], literals=[3], base=10))
    with pytest.raises(RemoteOpError):
        connection.request(predicted(predictor, 0, ext=[1, 2], literals=[5], base=20))
    with pytest.raises(ProtocolError, match="handle 77"):
        connection.request(predicted(predictor, 0, ext=[1, 77], literals=[7], base=30, inputs=[]))
    upload(connection, 77, floats(1, 2))
    connection.post(Upload(5, TensorSpec("float32", [1], [1]), b"?" * 32), [floats(1).numpy()])
    with pytest.raises(ProtocolError, match="digest"):  # of the upload; the program is not run
        connection.request(predicted(predictor, 0, ext=[1, 77], literals=[9], base=40))
    request = predicted(predictor, 0, ext=[1, 77], literals=[11], base=50, fetch=[51])
    assert len(request.vectors) < 40
    assert fetched_tensors(*connection.request(request))[0].tolist() == [22, 44]


def test_a_template_that_does_not_compile_keeps_its_predictions(connection):
    upload(connection, 1, floats(1))
    predictor = Predictor()
    evil = body(("aten::from_file", [["t"]], [-1]), n_ext=1, kept=[0])
    for k in range(4):
        request = predicted(predictor, 0, evil if k == 0 else None, ext=[1], base=10 * k)
        assert bool(request.vectors) == (k == 0)
        with pytest.raises(UnsupportedOpError):
            connection.request(request)


def test_a_malformed_residual_is_refused_and_changes_nothing(connection):
    upload(connection, 1, floats(1, 2))
    predictor = Predictor()
    connection.request(predicted(predictor, 0, SCALE_IN_PLACE, ext=[1], literals=[3]))
    for vectors in (b"123", struct.pack("<5I", 2**32 - 1, 0, 0, 0, 0), struct.pack("<5I", 1, 0, 0, 0, 2)):
        with pytest.raises(ProtocolError):
            connection.request(Execute("n", template=0, vectors=vectors))
    for lane in (-1, MAX_LANES):
        with pytest.raises(ProtocolError, match="lane"):
            connection.request(Execute("n", template=0, vectors=b"", lane=lane))
    connection.request(predicted(predictor, 0, ext=[1], literals=[3]))
    assert fetch(connection, 1)[0].tolist() == [9, 18]


def test_lanes_of_a_template_are_predicted_apart(connection):
    upload(connection, 1, floats(1, 2))
    lanes = [Predictor(), Predictor()]
    for k in range(4):
        for lane, literal in enumerate((2, 100)):
            request = predicted(
                lanes[lane],
                0,
                SCALE_IN_PLACE if k + lane == 0 else None,
                ext=[1],
                literals=[literal],
                lane=lane,
            )
            assert bool(request.vectors) == (k == 0)
            connection.request(request)
    assert fetch(connection, 1)[0].tolist() == [200.0**4, 2 * 200.0**4]


def test_an_evicted_template_is_predicted_anew(connection):
    upload(connection, 1, floats(1, 2))
    predictor = Predictor()
    connection.request(predicted(predictor, 0, SCALE_IN_PLACE, ext=[1], literals=[3]))
    known = body(("aten::mul_.Scalar", [["t"], ["i"]], [-1], [0]), n_ext=1, kept=[])
    known.defs.clear()
    with pytest.raises(ProtocolError, match="takes 1 ints"):
        connection.request(predicted(predictor, 0, known, ext=[1], literals=[3], evict=[0]))
    connection.request(predicted(Predictor(), 0, known, ext=[1], literals=[5], evict=[0]))
    assert fetch(connection, 1)[0].tolist() == [15, 30]


def test_a_session_holds_a_bounded_number_of_templates():
    device = Device(torch.device("cpu"), "cpu:0", DeviceFacts("", 0, "", "", 0, ""))
    executor = Executor(device, HandleStore(), max_templates=2)

    def run(*arguments, **options):
        return executor.execute(execute(*arguments, **options), EMPTY, None)

    seed = body(("genie::manual_seed", [["i"]], [], []), n_ext=0, kept=[])
    run(0, seed, literals=[1])
    seed.defs.clear()
    run(1, seed, literals=[1])
    with pytest.raises(Fault, match="over 2 are held"):
        run(2, seed, literals=[1])
    run(2, seed, literals=[1], evict=[0])
    run(2, literals=[1])
    with pytest.raises(Fault, match="never sent"):
        run(0, literals=[1])
    assert len(executor.templates) == 2


def test_receipts_of_quiet_programs_name_their_work_once(connection):
    upload(connection, 1, floats(1))

    def quiet_then_read(nonce, program=None, evict=()):
        connection.post(
            execute(0, program, ext=[1], literals=[1], quiet=True, nonce="before", evict=list(evict))
        )
        connection.post(execute(0, ext=[1], literals=[1], quiet=True, nonce=nonce))
        return connection.request(Execute(nonce, fetch=[1]))[0].earlier

    def told(earlier):
        return [r.work is not None for r in earlier]

    first = quiet_then_read("a", SCALE_IN_PLACE)
    assert [r.nonce for r in first] == ["before", "a"]
    assert told(first) == [True, False] and len(first[0].work[1]) == 32
    assert told(quiet_then_read("b")) == [False, False]
    known = body(("aten::mul_.Scalar", [["t"], ["i"]], [-1], [0]), n_ext=1, kept=[])
    known.defs.clear()
    assert told(quiet_then_read("c", known, evict=[0])) == [True, False]
    connection.post(execute(0, ext=[1], literals=[1], quiet=True))
    assert told(connection.request(Counters())[0].earlier) == [False]
