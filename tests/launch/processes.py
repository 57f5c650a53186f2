"""What the tests of launchers share: processes that are gone, and sessions that work."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import torch

import genie
from genie.runtime.child_process import running

TOKEN = "a-token-for-tests"


def gone(pids, seconds: float = 10.0) -> bool:
    """Whether all processes have ended within ``seconds``."""
    pids = list(pids)
    return until(lambda: not any(map(running, pids)), seconds)


def until(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def computes(address: str, token: str = TOKEN, tls_ca: str | None = None) -> int:
    """A product on the server is the local one; returns the pid that its handshake names."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=generator), torch.randn(7, 3, generator=generator)
    with genie.connect(address, token, tls_ca=tls_ca) as session:
        assert torch.allclose((a.to("genie") @ b.to("genie")).cpu(), a @ b)
        return session.executor.link.connection.welcome.pid


def make_certificate(folder: Path, *names: str) -> tuple[str, str]:
    """Paths of a self-signed certificate for ``names`` ("IP:10.0.0.1", "DNS:node1"), and of its key."""
    assert shutil.which("openssl"), "the openssl command is not installed"
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pool"
    subject = ["-addext", f"subjectAltName={','.join(names)}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *subject], check=True, capture_output=True, timeout=30)
    return str(cert), str(key)
