"""Calibrations on disk: found again, never half-written, and measured anew when they cannot be used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import msgspec
import pytest

from genie.cost import store
from genie.cost.fit import fit
from genie.cost.model import FORMAT, DeviceModel
from genie.device_facts import DeviceFacts
from genie.errors import ConfigError
from tests.cost.nodes import linear, samples

FACTS = DeviceFacts("cpu", "A CPU/7", 1, "2.13.0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path))
    return tmp_path / "cost"


@pytest.fixture(scope="module")
def measured() -> DeviceModel:
    return replace(fit("cpu:0 A CPU/7", samples()), key=store.key_of(FACTS))


def test_a_stored_calibration_is_found_again(measured, cache):
    assert store.load(measured.key) is None
    path = store.save(measured)
    assert path.parent == cache
    found = store.load(measured.key)
    assert found is not None
    assert found.seconds([linear(5, 6, 7)]) == measured.seconds([linear(5, 6, 7)])
    assert os.listdir(cache) == [path.name]


@pytest.mark.parametrize(
    "other", [{"cores": 2}, {"torch": "2.14"}, {"model": "A CPU/8"}, {"type": "cuda"}, {"driver": "1"}]
)
def test_another_device_has_another_file(measured, other):
    store.save(measured)
    assert store.load(store.key_of(msgspec.structs.replace(FACTS, **other))) is None


def test_the_version_of_the_format_is_in_the_key(measured):
    store.save(measured)
    assert store.load({**measured.key, "format": FORMAT + 1}) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff", b'{"format": 1}', b"[1, 2]"])
def test_a_damaged_file_is_named_and_replaced(measured, content, caplog):
    path = store.path_of(measured.key)
    path.parent.mkdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.load(measured.key) is None
    assert str(path) in caplog.text
    assert "measured anew" in caplog.text
    store.save(measured)
    assert store.load(measured.key) is not None


def test_the_file_of_another_device_is_not_believed(measured, caplog):
    key = store.key_of(msgspec.structs.replace(FACTS, cores=2))
    store.save(measured).rename(store.path_of(key))
    with caplog.at_level(logging.WARNING):
        assert store.load(key) is None
    assert "another device" in caplog.text


def test_a_directory_that_cannot_be_used_is_named(measured, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("GENIE_CACHE_DIR", str(file))
    with pytest.raises(ConfigError, match="GENIE_CACHE_DIR"):
        store.save(measured)
    with pytest.raises(ConfigError, match="GENIE_CACHE_DIR"):
        store.load(measured.key)


def test_xdg_and_home_are_used_in_turn(tmp_path, monkeypatch):
    monkeypatch.delenv("GENIE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.directory() == tmp_path / "xdg" / "genie" / "cost"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.directory() == tmp_path / ".cache" / "genie" / "cost"


def test_writers_and_readers_do_not_meet(measured, cache):
    store.save(measured)
    broken: list[object] = []

    def write() -> None:
        for _ in range(20):
            store.save(measured)

    def read() -> None:
        for _ in range(60):
            if store.load(measured.key) is None:
                broken.append("a reader found no whole file")

    threads = [threading.Thread(target=f) for f in (write, write, read, read)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not broken
    assert len(os.listdir(cache)) == 1


def test_a_limited_calibration_is_not_that_of_others(measured):
    limited = replace(measured, key=store.key_of(FACTS, 1 << 20))
    store.save(limited)
    assert store.load(store.key_of(FACTS)) is None
    assert store.load(store.key_of(FACTS, 1 << 21)) is None
    assert store.load(limited.key) is not None


_HOLDER = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(measured, cache):
    """Another process that is measuring the same device."""
    cache.mkdir()
    lock = str(store.path_of(measured.key).with_suffix(".lock"))
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.wait(30)
        process.stdin.close()
        process.stdout.close()


def test_one_process_measures_a_device_at_a_time(measured, holder, caplog):
    with caplog.at_level(logging.WARNING), store.alone(measured.key, timeout_s=0.3) as alone:
        assert not alone
    assert "measuring beside it" in caplog.text
    with store.alone(store.key_of(msgspec.structs.replace(FACTS, cores=2)), timeout_s=0.0) as alone:
        assert alone


@pytest.mark.parametrize("end", ["leaves", "dies"])
def test_the_next_one_begins_when_the_first_ends(measured, holder, end):
    timer = threading.Timer(0.3, holder.kill if end == "dies" else holder.stdin.close)
    timer.start()
    start = time.monotonic()
    with store.alone(measured.key, timeout_s=60) as alone:
        assert alone
    assert 0.2 < time.monotonic() - start < 30
    timer.join(30)
