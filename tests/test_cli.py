"""``genie``: errors are one line and an exit status, and ``genie serve`` runs by hand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from genie.cli import main
from genie.errors import ConfigError
from genie.runtime.connection import Connection
from genie.server.command import parse_cores, parse_size
from genie.wire.messages import Ping


def genie(*args: str, token: str | None = "t", **options) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "GENIE_TOKEN"} | (
        {"GENIE_TOKEN": token} if token else {}
    )
    return subprocess.Popen(
        [sys.executable, "-m", "genie", *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_serve_by_hand(tmp_path):
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o600)
    process = genie("serve", "--device", "cpu", "--token-file", str(file), token=None)
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["pid"] == process.pid
        with Connection.connect(ready["address"], "secret") as c:
            assert c.request(Ping())
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "stopped" in stderr
        assert "Traceback" not in stderr
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_is_told_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = genie("serve", "--device", "cpu", "--port", port)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"genie serve: cannot listen on 127.0.0.1:{port}" in stderr
    assert "choose another --port" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--host", "0.0.0.0", "--device", "cpu"], "--insecure"),
        (["--device", "tpu"], "unknown device"),
        (["--device", "cpu:x"], "must be a number"),
        (["--memory-limit", "lots"], "is no size"),
        (["--tls-cert", "cert.pem"], "go together"),
        (["--token-file", "/absent/token"], "cannot read the token file"),
        (["--cores", "4095"], "give others to --cores"),
    ],
)
def test_bad_options_are_one_line(args, expected, monkeypatch, capsys):
    monkeypatch.setenv("GENIE_TOKEN", "t")
    assert main(["serve", *args]) == 2
    text = capsys.readouterr().err
    assert text.startswith("genie serve: ")
    assert expected in text
    assert text.count("\n") == 1


def test_a_server_without_a_token_does_not_start(monkeypatch, capsys):
    monkeypatch.delenv("GENIE_TOKEN", raising=False)
    assert main(["serve", "--device", "cpu"]) == 2
    assert "GENIE_TOKEN" in capsys.readouterr().err


def test_sizes_and_cores_parse():
    assert [parse_size(s) for s in ("0", "64K", "1.5M", "2g")] == [0, 65536, 1572864, 2 << 30]
    assert parse_cores("0,2-4, 2") == (0, 2, 3, 4)
    assert parse_cores("") == ()
    for bad in ("-1", "1G2", "", "1T"):
        with pytest.raises(ConfigError):
            parse_size(bad)
    with pytest.raises(ConfigError):
        parse_cores("a")
