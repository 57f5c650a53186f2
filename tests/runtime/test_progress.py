"""A large upload shows a bar on a terminal, and nothing where nobody watches."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from genie.devices import device_slot
from genie.runtime.server_process import ServerProcess

UPLOAD = """
import sys, torch, genie
with genie.connect(sys.argv[1], "progress"):
    layer = torch.nn.Linear(4096, 6144, bias=False).requires_grad_(False).to("genie")
    layer(torch.ones(1, 4096).to("genie")).cpu()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess.start(
        device_slot("cpu", 0), token="progress", log_dir=tmp_path_factory.mktemp("logs")
    ) as started:
        yield started


def upload(server: ServerProcess, stderr: int) -> None:
    subprocess.run(
        [sys.executable, "-c", UPLOAD, server.address], stderr=stderr, timeout=60, check=True, env=os.environ
    )


def test_a_terminal_sees_the_upload(server):
    ours, theirs = pty.openpty()
    upload(server, theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "uploading weights" in shown and "MB" in shown


def test_a_log_file_does_not(server, tmp_path):
    with open(tmp_path / "stderr", "wb") as stderr:
        upload(server, stderr.fileno())
    assert "uploading" not in (tmp_path / "stderr").read_text()
