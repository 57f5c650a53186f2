"""Stateless programs: nothing tells the server what is state, so every live result goes back."""

from __future__ import annotations

import pytest
import torch

from genie.errors import ProtocolError
from genie.runtime.connection import fetched_tensors, live_tensors
from genie.wire.digest import digest as digest_of
from genie.wire.messages import Counters, TensorSpec, Upload
from tests.server.programs import ADD, SCALE_IN_PLACE, body, dense, execute, fetch, floats

SELECT = ("aten::select.int", [["t"], ["i"], ["i"]], [-1])


def upload(c, handle, tensor, digest=False):
    spec, data = dense(tensor)
    c.post(Upload(handle, spec, digest_of(data) if digest else None), [data])


def test_every_live_result_comes_back_with_its_aliases(connection):
    program = body(ADD, ("aten::select.int", [["t"], ["i"], ["i"]], [0]), n_ext=1, kept=[0, 1])
    data = floats(1, 2, 3).numpy()
    result, payload = connection.request(
        execute(
            0,
            program,
            ext=[1],
            literals=[0, 2],
            base=10,
            inputs=[(1, TensorSpec("float32", [3], [1]))],
            stateless=True,
        ),
        [data],
    )
    live = live_tensors(result, payload)
    assert live[10].tolist() == [2, 4, 6]
    assert live[11].item() == 6
    assert result.storages == [12]
    live[10][2] = 9
    assert live[11].item() == 9
    assert connection.request(Counters())[0].handles == 0


def test_results_are_forgotten_and_uploads_stay(connection):
    upload(connection, 1, floats(1, 2))
    connection.request(execute(0, body(ADD, n_ext=1, kept=[0]), ext=[1], base=10, stateless=True))
    with pytest.raises(ProtocolError, match="handle 10"):
        fetch(connection, 10)
    assert fetch(connection, 1)[0].tolist() == [1, 2]


def test_a_view_of_uploaded_content_is_resident(connection):
    upload(connection, 1, torch.arange(6.0).reshape(2, 3), digest=True)
    result, payload = connection.request(
        execute(0, body(SELECT, n_ext=1, kept=[0]), ext=[1], literals=[0, 1], base=10, stateless=True)
    )
    assert payload.numel() == 0
    (value,) = result.live
    assert (value.handle, value.resident, value.spec) == (10, 1, TensorSpec("float32", [3], [1], 3, -2))


@pytest.mark.parametrize("digest", [False, True])
def test_uploaded_content_that_is_written_to_comes_back(connection, digest):
    upload(connection, 1, floats(1, 2), digest=digest)
    result, payload = connection.request(execute(0, SCALE_IN_PLACE, ext=[1], literals=[3], stateless=True))
    assert {h: t.tolist() for h, t in live_tensors(result, payload).items()} == {1: [3, 6]}
    with pytest.raises(ProtocolError, match="handle 1"):
        fetch(connection, 1)


def test_inputs_that_share_a_storage_are_written_through(connection):
    data = torch.arange(6.0).numpy()
    whole, part = TensorSpec("float32", [6], [1], 0, 0), TensorSpec("float32", [2], [1], 2, 0)
    result, payload = connection.request(
        execute(
            0,
            SCALE_IN_PLACE,
            ext=[2],
            literals=[10],
            inputs=[(1, whole), (2, part)],
            storages=[24],
            fetch=[1],
            stateless=True,
        ),
        [data],
    )
    assert fetched_tensors(result, payload)[0].tolist() == [0, 1, 20, 30, 4, 5]
    live = live_tensors(result, payload)
    assert list(live) == [2]
    assert live[2].untyped_storage().nbytes() == 24


def test_a_failed_stateless_program_leaves_nothing(connection):
    upload(connection, 1, floats(1, 2))
    spec, data = dense(floats(1, 2, 3))
    bad = body(("aten::add.Tensor", [["t"], ["t"]], [-1, -2]), n_ext=2, kept=[0])
    with pytest.raises(Exception, match="aten::add"):
        connection.request(execute(0, bad, ext=[1, 2], base=10, inputs=[(2, spec)], stateless=True), [data])
    assert connection.request(Counters())[0].handles == 1
