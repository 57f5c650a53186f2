"""Uploads are received, checked and copied at the same time; nobody sees that, except by their speed."""

from __future__ import annotations

import os
import time

import msgspec
import pytest
import torch

from genie.devices import device_slot
from genie.errors import OutOfMemoryError, ProtocolError
from genie.runtime.server_process import ServerProcess
from genie.server.transfers import PIECE, PIECES, Transfers
from genie.server.uploads import Landing, Staging, Uploads
from genie.wire.buffers import BoundedPool
from genie.wire.digest import digest as digest_of
from genie.wire.framing import MAGIC, PRELUDE
from genie.wire.messages import PROTOCOL_VERSION, Adopt, Counters, Offer, Ping, Release, TensorSpec, Upload
from tests.server.programs import DEVICE, DOUBLE, MEMORY_LIMIT, TOKEN, connect, dense, execute, fetch, floats


def upload(c, handle, tensor, digest=None):
    spec, data = dense(tensor)
    c.post(Upload(handle, spec, digest if digest is not None else digest_of(data)), [data])


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)


# -- over a socket ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 70_000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 77])
def test_contents_of_any_size_arrive_whole(connection, nbytes):
    tensor = random_bytes(nbytes, nbytes)
    upload(connection, 1, tensor)
    assert torch.equal(fetch(connection, 1)[0], tensor)


def test_a_program_sees_all_uploads_before_it(connection):
    tensors = [torch.randn(n) for n in (3, 500_000, 7, 1_500_000, 2)]
    for h, t in enumerate(tensors):
        upload(connection, h, t)
    for h, t in enumerate(tensors):
        request = execute(0, None if h else DOUBLE, ext=[h], base=100 + h, fetch=[100 + h])
        result, payload = connection.request(request)
        assert torch.equal(payload.view(torch.float32), t * 2)
        assert result.receipt.ops == 1


def test_the_last_upload_of_a_handle_counts_and_a_release_after_it_too(connection):
    big, small = torch.randn(1_500_000), floats(5)
    upload(connection, 1, big)
    upload(connection, 1, small)
    upload(connection, 2, small)
    upload(connection, 2, big)
    upload(connection, 3, big)
    connection.post(Release([3]))
    assert fetch(connection, 1)[0].tolist() == [5]
    assert torch.equal(fetch(connection, 2)[0], big)
    with pytest.raises(ProtocolError, match="handle 3 is not bound"):
        fetch(connection, 3)
    assert connection.request(Counters())[0].handles == 2


@pytest.mark.parametrize("request_", [Ping(), Offer([b"x" * 32], [1])], ids=["ping", "offer"])
def test_a_wrong_digest_among_others_answers_the_next_request_and_poisons_its_handle(connection, request_):
    tensors = [torch.randn(400_000) for _ in range(4)]
    for h, t in enumerate(tensors):
        upload(connection, h, t, digest=b"\0" * 32 if h == 1 else None)
    with pytest.raises(ProtocolError, match="handle 1 do not have the digest"):
        connection.request(request_)
    assert connection.request(Ping())
    with pytest.raises(ProtocolError, match="handle 1 do not have the digest"):
        fetch(connection, 1)
    for h in (0, 2, 3):
        assert torch.equal(fetch(connection, h)[0], tensors[h])
    assert connection.request(Offer([b"\0" * 32], [1_600_000]))[0].missing == [0]


def test_the_first_failure_is_told_also_when_a_later_upload_is_refused_at_once(connection):
    upload(connection, 1, torch.randn(1_000_000), digest=b"\1" * 32)
    upload(connection, 2, torch.zeros(MEMORY_LIMIT + 1, dtype=torch.uint8))
    with pytest.raises(ProtocolError, match="do not have the digest"):
        connection.request(Ping())
    with pytest.raises(OutOfMemoryError):
        fetch(connection, 2)


def test_uploads_that_wait_count_towards_the_limit(connection):
    third = MEMORY_LIMIT // 3
    for h in range(4):
        upload(connection, h, random_bytes(third, h))
    with pytest.raises(OutOfMemoryError, match="--memory-limit"):
        connection.request(Ping())
    assert connection.request(Counters())[0].held_bytes == 3 * third


def test_an_upload_without_its_payload_is_refused(connection):
    connection.post(Upload(1, TensorSpec("float32", [4], [1])))
    with pytest.raises(ProtocolError, match="needs 16 bytes"):
        connection.request(Ping())
    connection.post(Upload(2, TensorSpec("float32", [0, 4], [4, 1]), digest_of(b"")))
    assert fetch(connection, 2)[0].shape == (0, 4)


def test_other_sessions_find_what_a_silent_one_uploaded(server, connection):
    tensor = random_bytes(2 * PIECE + 5, 1)
    content, spec = digest_of(tensor.numpy().data), dense(tensor)[0]
    upload(connection, 1, tensor)  # and then says nothing any more
    with connect(server) as other:
        deadline = time.monotonic() + 20
        while other.request(Offer([content], [tensor.nbytes]))[0].missing:
            assert time.monotonic() < deadline, "an upload is not finished before the next message"
            time.sleep(0.01)
        other.post(Adopt(9, spec, content))
        assert torch.equal(fetch(other, 9)[0], tensor)


def test_a_client_that_dies_within_an_upload_leaves_nothing(server, connection):
    tensor = random_bytes(MEMORY_LIMIT // 2, 2)
    other = connect(server)
    upload(other, 1, random_bytes(100_000, 3))
    assert other.request(Ping())
    spec, data = dense(tensor)
    header = msgspec.msgpack.encode(Upload(2, spec, digest_of(data)))
    frame = PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), len(data)) + header
    sock = other._channel._sock
    sock.sendall(frame + data[: len(data) // 2].tobytes())
    sock.close()
    upload(connection, 1, tensor)
    assert torch.equal(fetch(connection, 1)[0], tensor)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_server_of_several_cores_hashes_while_it_receives(tmp_path):
    with (
        ServerProcess.start(
            device_slot(DEVICE, 0), token=TOKEN, log_dir=tmp_path, extra_args=["--cores", _two_cores()]
        ) as server,
        connect(server) as c,
    ):
        tensors = [random_bytes(3 * PIECE + 100 * k, k) for k in range(6)]
        for h, t in enumerate(tensors):
            upload(c, h, t, digest=b"\0" * 32 if h == 4 else None)
        with pytest.raises(ProtocolError, match="handle 4 do not have the digest"):
            c.request(Ping())
        for h, t in enumerate(tensors):
            if h != 4:
                assert torch.equal(fetch(c, h)[0], t)


def _two_cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


# -- staged as for a GPU ---------------------------------------------------------------------------


def fill(landing: Landing, data: torch.Tensor) -> None:
    at = 0
    source = data.numpy()
    for piece in landing.pieces():
        piece[:] = source[at : at + len(piece)].data
        at += len(piece)
    assert at == len(source)


@pytest.mark.parametrize("nbytes", [1, PIECE, PIECE + 1, 5 * PIECE + 77])
def test_staged_contents_arrive_whole(nbytes):
    transfers = Transfers(torch.device("cpu"), staged=True)
    staging = Staging(transfers)
    data = random_bytes(nbytes, nbytes)
    landing = Landing(transfers, staging, nbytes, checked=True)
    fill(landing, data)
    storage, digest = landing.finish()
    assert digest == digest_of(data.numpy().data)
    assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(storage), data)


def test_staging_memory_is_bounded_and_used_again():
    transfers = Transfers(torch.device("cpu"), staged=True)
    bound = []
    uploads = Uploads(transfers, lambda message, landing: bound.append((message.handle, *landing.finish())))
    data = [random_bytes(3 * PIECE + k, k) for k in range(12)]
    spec = TensorSpec("uint8", [1], [1])
    for k, d in enumerate(data):
        landing = uploads.landing(d.numel(), checked=True)
        fill(landing, d)
        uploads.add(Upload(k, spec), landing)
        assert transfers.pool.made_bytes <= PIECES * PIECE
    assert uploads.nbytes == sum(d.numel() for d in data)
    uploads.settle()
    assert [h for h, _, _ in bound] == list(range(12))
    for (_, storage, digest), d in zip(bound, data, strict=True):
        assert digest == digest_of(d.numpy().data)
        assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(storage), d)
    made = transfers.pool.made_bytes
    fill(uploads.landing(data[0].numel(), checked=False), data[0])
    assert transfers.pool.made_bytes == made


def test_sessions_that_share_too_little_staging_memory_get_by():
    transfers = Transfers(torch.device("cpu"), staged=True)
    transfers.pool = BoundedPool(2 * PIECE, lambda n: torch.empty(n, dtype=torch.uint8))
    data = random_bytes(4 * PIECE, 1)
    landings = [Landing(transfers, Staging(transfers), data.numel(), checked=True) for _ in range(3)]
    for landing in landings:
        fill(landing, data)
    for landing in landings:
        assert landing.finish()[1] == digest_of(data.numpy().data)
    assert transfers.pool.made_bytes <= 2 * PIECE


def test_payloads_come_from_the_pool_as_far_as_it_goes():
    transfers = Transfers(torch.device("cpu"), staged=True)
    transfers.pool = BoundedPool(1 << 20, lambda n: torch.empty(n, dtype=torch.uint8))
    first = transfers.new_payload(1 << 20)
    address = first.data_ptr()
    second = transfers.new_payload(1 << 20)
    assert second.data_ptr() != address
    assert transfers.pool.made_bytes == 1 << 20
    del first
    assert transfers.new_payload((1 << 20) - 5).data_ptr() == address
