"""A GPU that is lost in the middle: typed errors for everyone, from a process that still answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import genie
from genie.errors import DeviceLostError, RemoteError, RemoteOpError
from genie.server.engine import EngineError
from genie.server.faults import fault_of, is_device_lost
from genie.wire.messages import Counters, CountersReply, Load, Ping, Pong
from tests.server.engines.serving import TOKEN, Serving, counters, prompt, session
from tests.server.engines.toys import Decoder, generate
from tests.server.programs import dense, execute

IDS = prompt(vocabulary=64)
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below "
    "might be incorrect."
)


@pytest.fixture
def doomed() -> Iterator[Serving]:
    """A server of the test's own."""
    serving = Serving()
    yield serving
    serving.close()


def accelerator_error(text: str) -> RuntimeError:
    return getattr(torch, "AcceleratorError", RuntimeError)(text)


def lose(serving: Serving, error: RuntimeError) -> None:
    """The next program finds out when it waits for the device."""

    def gone():
        raise error

    serving.device.synchronize = gone


@pytest.mark.parametrize("kind", [RuntimeError, accelerator_error], ids=["RuntimeError", "AcceleratorError"])
def test_the_client_is_told_and_so_is_everyone_after(doomed, caplog, kind):
    with caplog.at_level(logging.INFO, "genie.server"), session(doomed, replay=False):
        waiting = torch.ones(3).to("genie") * 2
        waiting.cpu()
        with session(doomed, replay=False):
            x = torch.ones(3).to("genie") + 1
            lose(doomed, kind(ILLEGAL))
            with pytest.raises(DeviceLostError, match="illegal memory access") as raised:
                x.cpu()
            assert "Restart the server" in str(raised.value) and "dmesg" in str(raised.value)
            assert "Xid" in str(raised.value)
            assert "asynchronously" not in str(raised.value).split("--- server log ---")[0]
            with pytest.raises(DeviceLostError):
                (torch.ones(4).to("genie") * 3).cpu()
        # At once: nothing is tried on the device again.
        doomed.device.synchronize = lambda: pytest.fail("the lost device was used")
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            (waiting + 1).cpu()
        with session(doomed, replay=False), pytest.raises(DeviceLostError):
            (torch.ones(2).to("genie") + 1).cpu()
    critical = [r for r in caplog.records if r.levelno == logging.CRITICAL]
    assert len(critical) == 1 and "illegal memory access" in critical[0].getMessage()


def test_the_process_stays_answerable(doomed):
    with session(doomed, replay=False):
        x = torch.ones(3).to("genie") + 1
        lose(doomed, RuntimeError(ILLEGAL))
        with pytest.raises(DeviceLostError):
            x.cpu()
    with genie.connect(doomed.address, TOKEN) as opened:
        c = opened.executor.link.connection
        for _ in range(2):
            assert isinstance(c.request(Ping())[0], Pong)
            assert isinstance(c.request(Counters())[0], CountersReply)
            with pytest.raises(DeviceLostError):
                c.request(Load())
            spec, data = dense(torch.ones(1 << 16))
            with pytest.raises(DeviceLostError):
                c.request(execute(-1, inputs=[(7, spec)]), [data])
        assert c.alive
    assert doomed.thread.is_alive()


def test_what_was_sent_quietly_is_told_by_the_next_reply(doomed):
    with session(doomed, replay=False) as opened:
        lose(doomed, RuntimeError(ILLEGAL))
        x = torch.ones(3).to("genie")
        for _ in range(300):  # more than one program
            x = x * 1.5 - 1
        with pytest.raises(DeviceLostError):
            x.cpu()
        assert opened.executor.link.counters().templates >= 1


@pytest.mark.parametrize("where", ["capture", "replay"])
def test_an_engine_that_loses_the_device(doomed, monkeypatch, where):
    """The eager engine is not asked to go on with it."""

    def capture(call):
        if where == "capture":
            raise accelerator_error("CUDA error: unspecified launch failure")
        outputs, replays = call(), []

        def replay():
            replays.append(1)
            if len(replays) > 3:
                raise accelerator_error("CUDA error: unspecified launch failure")
            for old, new in zip(outputs, call(), strict=True):
                if old is not None and new is not None:
                    old.copy_(new)

        return replay, outputs, 0

    doomed.use_pool(capture=capture)
    with session(doomed, replay=False) as opened:
        remote = Decoder().to("genie")
        with pytest.raises(DeviceLostError, match="unspecified launch failure"):
            generate(remote, IDS.to("genie"))
        assert counters(opened)["engine_failed"] == 0
        assert doomed.device.lost


def test_an_error_that_leaves_the_device_as_it_was_does_not_lose_it(doomed):
    with session(doomed, replay=False):
        x = torch.ones(3).to("genie") + 1
        working, doomed.device.synchronize = doomed.device.synchronize, lambda: None
        lose(doomed, RuntimeError("CUDA error: invalid argument"))
        with pytest.raises(RemoteError, match="invalid argument") as raised:
            x.cpu()
        assert not isinstance(raised.value, DeviceLostError)
        doomed.device.synchronize = working
        assert (torch.ones(2).to("genie") + 1).tolist() == [2.0, 2.0]
    assert not doomed.device.lost


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (accelerator_error("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA error: misaligned address"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"), False),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), False),
        (torch.OutOfMemoryError("CUDA out of memory: unknown error"), False),
        (
            RuntimeError(
                "mat1 and mat2 shapes cannot be multiplied (an illegal memory access was encountered)"
            ),
            False,
        ),
        (ValueError("CUDA error: unknown error"), False),
    ],
)
def test_which_errors_lose_a_device(error, lost):
    assert is_device_lost(error) is lost
    failed = EngineError(3, "aten::mm.default", error)
    failed.__cause__ = error
    assert is_device_lost(failed) is lost
    fault = fault_of(failed, nonce="n", device="cuda:0 H200")
    assert (fault.error == DeviceLostError.__name__) is lost
    assert fault.instruction == 3
    if lost:
        assert "cuda:0 H200 was lost during aten::mm.default" in fault.message


def test_an_op_that_fails_loses_nothing(doomed):
    with session(doomed, replay=False), pytest.raises(RemoteOpError):
        table = torch.ones(4, 2).to("genie")
        torch.nn.functional.embedding(torch.tensor([9]).to("genie"), table).cpu()
    assert not doomed.device.lost
