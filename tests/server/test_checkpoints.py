"""Weights that the server reads from its own files instead of the socket."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import genie
import genie.torchvision_compat  # before transformers
from genie.devices import device_slot
from genie.errors import ConfigError
from genie.runtime.connection import Connection
from genie.runtime.server_process import ServerProcess
from genie.server import checkpoints as checkpoints_module
from genie.server.checkpoints import ChangedError, Checkpoints
from genie.wire.digest import digest as digest_of
from genie.wire.messages import Adopt, Offer, TensorSpec
from tests.server.programs import fetch

TOKEN = "checkpoints"


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


def start(tmp_path, *directories, extra=()) -> ServerProcess:
    named = [part for d in directories for part in ("--checkpoints", str(d))]
    return ServerProcess.start(
        device_slot("cpu", 0), token=TOKEN, log_dir=tmp_path / "logs", extra_args=[*named, *extra]
    )


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (300, 200), "b": (300, 200), "c": (1500, 1100), "small": (10,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def content(tensor: torch.Tensor) -> tuple[bytes, int]:
    return digest_of(tensor.numpy().tobytes()), tensor.nbytes


def offer(c: Connection, *tensors: torch.Tensor) -> list[int]:
    digests, sizes = zip(*map(content, tensors), strict=True)
    return c.request(Offer(list(digests), list(sizes)))[0].missing


# -- end to end ------------------------------------------------------------------------------------


def test_a_model_from_a_checkpoint_that_the_server_has_is_not_uploaded(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=3000, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "models" / "gpt2")
    prompt = torch.arange(5)[None]

    def moved(server) -> tuple[int, torch.Tensor]:
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "models" / "gpt2").eval()
        with genie.connect(server.address, TOKEN) as session, torch.no_grad():
            model.to("genie")
            session.synchronize()
            sent = session.executor.link.connection.bytes_out
            return sent, model(prompt.to("genie")).logits.cpu()

    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path / "models" / "gpt2").eval()(prompt).logits
    with start(tmp_path) as plain, start(tmp_path, tmp_path / "models") as server:
        uploaded, logits = moved(plain)
        assert uploaded > 9_000_000
        torch.testing.assert_close(logits, expected)
        for _ in range(2):
            sent, logits = moved(server)
            assert sent < 120_000, "only what is under 64 KB travels"
            torch.testing.assert_close(logits, expected)
        assert "were loaded from checkpoints" in server.log_tail()


def test_a_file_that_changed_is_used_as_it_is_now_and_what_it_held_is_uploaded(tmp_path):
    old, new = weights(0), weights(1)
    save_file(old, tmp_path / "w.safetensors")
    with start(tmp_path, tmp_path) as server, Connection.connect(server.address, TOKEN) as c:
        assert offer(c, old["a"]) == []
        save_file(new, tmp_path / "w.safetensors")
        assert offer(c, old["c"]) == [0]
        deadline = time.monotonic() + 30
        while offer(c, new["c"]) == [0]:  # it looks again after some seconds
            assert time.monotonic() < deadline
            time.sleep(0.2)
        digest, _ = content(new["c"])
        c.post(Adopt(1, TensorSpec("float32", [1500, 1100], [1100, 1]), digest))
        assert torch.equal(fetch(c, 1)[0], new["c"])
        assert "was changed" in server.log_tail() or "changed since" in server.log_tail()


def test_contents_that_would_exceed_the_limit_are_left_to_the_upload_that_says_so(tmp_path):
    w = weights()
    save_file(w, tmp_path / "w.safetensors")
    with (
        start(tmp_path, tmp_path, extra=["--memory-limit", "400K"]) as server,
        Connection.connect(server.address, TOKEN) as c,
    ):
        assert offer(c, w["a"], w["b"], w["c"]) == [1, 2]


def test_a_directory_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="--checkpoints"):
        Checkpoints([str(tmp_path / "none")])
    command = [sys.executable, "-m", "genie", "serve", "--checkpoints", str(tmp_path / "none")]
    done = subprocess.run(
        command, env=os.environ | {"GENIE_TOKEN": "t"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0
    assert "--checkpoints" in done.stderr


# -- the index -------------------------------------------------------------------------------------


def read(place) -> bytes:
    data = bytearray(place.nbytes)
    place.read(iter([memoryview(data)]))
    return bytes(data)


def test_contents_are_found_by_digest_and_read_from_their_place(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    w = weights()
    save_file(w, tmp_path / "deep" / "er" / "w.safetensors", metadata={"format": "pt"})
    os.symlink(tmp_path / "deep" / "er" / "w.safetensors", tmp_path / "link.safetensors")
    index = Checkpoints([str(tmp_path)])
    for name in ("a", "b", "c"):
        place = index.find(*content(w[name]))
        assert place.name == name
        assert read(place) == w[name].numpy().tobytes()
    assert index.find(*content(w["small"])) is None, "what is sent without a digest is never asked for"
    assert index.find(b"?" * 32, w["a"].nbytes) is None
    assert index.find(content(w["a"])[0], w["c"].nbytes) is None
    assert Checkpoints().find(*content(w["a"])) is None


def test_digests_are_kept_for_files_that_stay_as_they_are(tmp_path, cache_dir, monkeypatch):
    w = weights()
    save_file(w, tmp_path / "w.safetensors")
    assert Checkpoints([str(tmp_path)]).find(*content(w["a"]))
    (kept,) = cache_dir.glob("*.json")
    assert set(json.loads(kept.read_bytes())["digests"]) == {"a", "b"}

    def fail(*_):
        raise AssertionError("it is hashed again")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints_module, "_hashed", fail)
        assert Checkpoints([str(tmp_path)]).find(*content(w["b"]))
    stat = os.stat(tmp_path / "w.safetensors")
    os.utime(tmp_path / "w.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints_module, "_hashed", fail)
        with pytest.raises(AssertionError, match="hashed again"):
            Checkpoints([str(tmp_path)]).find(*content(w["b"]))


def test_a_damaged_cache_is_replaced(tmp_path, cache_dir, caplog):
    w = weights()
    save_file(w, tmp_path / "w.safetensors")
    assert Checkpoints([str(tmp_path)]).find(*content(w["a"]))
    (kept,) = cache_dir.glob("*.json")
    kept.write_bytes(b"{")
    assert Checkpoints([str(tmp_path)]).find(*content(w["a"]))
    assert "computed anew" in caplog.text
    json.loads(kept.read_bytes())


def test_a_cache_that_cannot_be_written_is_named_once(tmp_path, monkeypatch, caplog):
    w = weights()
    save_file(w, tmp_path / "w.safetensors")
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "file"))
    index = Checkpoints([str(tmp_path)])
    assert index.find(*content(w["a"]))
    assert index.find(*content(w["c"]))
    assert caplog.text.count("GENIE_CACHE_DIR") == 1


@pytest.mark.parametrize("damage", ["cut", "header", "pickle", "empty"])
def test_a_file_that_is_corrupt_is_named_and_passed_over(tmp_path, caplog, damage):
    w = weights()
    save_file(w, tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    bad = {
        "cut": data[: len(data) // 2],
        "header": (1 << 60).to_bytes(8, "little") + data[8:],
        "pickle": pickle.dumps({"a": 1}),
        "empty": b"",
    }
    (tmp_path / "bad.safetensors").write_bytes(bad[damage])
    index = Checkpoints([str(tmp_path)])
    assert index.find(*content(w["a"])).file.path.endswith("good.safetensors")
    assert "bad.safetensors is not used" in caplog.text


def test_a_file_that_vanishes_is_passed_over(tmp_path, caplog, monkeypatch):
    w = weights()
    save_file(w, tmp_path / "w.safetensors")
    index = Checkpoints([str(tmp_path)])
    place = index.find(*content(w["a"]))
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(OSError):
        read(place)
    assert index.find(*content(w["c"])) is None
    monkeypatch.setattr(checkpoints_module, "LOOK_AGAIN_SECONDS", 0.0)
    assert index.find(*content(w["a"])) is None
    assert "Clients send what it held" in caplog.text


def test_bytes_that_changed_unnoticed_are_found_out_when_they_are_read(tmp_path):
    """Same size, same time: only the digest tells."""
    w = weights()
    path = tmp_path / "w.safetensors"
    save_file(w, path)
    caches = Checkpoints([str(tmp_path)])
    for name in ("a", "c"):
        assert caches.find(*content(w[name]))
    stat = os.stat(path)
    place = caches.find(*content(w["a"]))
    with open(path, "r+b") as file:
        file.seek(place.start + 5)
        file.write(b"\xff\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with start(tmp_path, tmp_path) as server, Connection.connect(server.address, TOKEN) as c:
        assert offer(c, w["a"]) == [0]
        assert "does not have its digest any more" in server.log_tail()
        assert offer(c, w["c"]) == [0], "such a file is not trusted any more"


def test_a_file_that_changes_while_it_is_read_is_found_out(tmp_path):
    w = weights()
    save_file(w, tmp_path / "w.safetensors")
    place = Checkpoints([str(tmp_path)]).find(*content(w["a"]))

    def pieces():
        yield memoryview(bytearray(1000))
        os.utime(tmp_path / "w.safetensors", ns=(0, 0))
        yield memoryview(bytearray(place.nbytes - 1000))

    with pytest.raises(ChangedError):
        place.read(pieces())


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO, "genie.server")
