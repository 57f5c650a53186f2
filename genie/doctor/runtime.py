"""Device ``genie`` at work: captured in this process, and executed by a server of its own."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from genie.doctor.findings import Finding, Request, ok, problem
from genie.errors import AuthError

WRONG = "this is a bug in Genie or in this torch: install the versions in constraints.txt, and report it"


def check_in_process(request: Request) -> Iterator[Finding]:
    import genie

    with genie.local():
        yield _finding("device genie", _largest_error(), "captured and executed in this process")


def check_server(request: Request) -> Iterator[Finding]:
    import genie
    from genie.devices import device_slot, resolve_device_type
    from genie.runtime.server_process import ServerProcess

    token = secrets.token_hex(16)
    slot = device_slot(resolve_device_type("auto"), 0)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="genie-doctor-") as folder,
        ServerProcess.start(slot, token=token, log_dir=Path(folder)) as server,
    ):
        ready_s = time.monotonic() - started
        with genie.connect(server.address, token, log_tail=server.log_tail):
            found = f"ran on {server.device} of a server at {server.address}, ready after {ready_s:.1f} s"
            yield _finding("server", _largest_error(), found)
        try:
            genie.connect(server.address, secrets.token_hex(16)).close()
        except AuthError:
            yield ok("server", "a wrong token is refused")
        else:
            yield problem("server", "a session with a wrong token was let in", WRONG)


def _largest_error() -> float:
    """Of a small layer on device genie, against torch itself on the same numbers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((16, 32), (24, 32), (24,)))
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    with torch.no_grad():
        there = [tensor.to("genie") for tensor in (x, weight, bias)]
        got = torch.nn.functional.gelu(torch.nn.functional.linear(*there)).cpu()
    return float((got - expected).abs().max())


def _finding(name: str, error: float, how: str) -> Finding:
    """Half precision is not used here: a GPU's TF32 is the loosest arithmetic that may occur."""
    if error < 1e-2:
        return ok(name, f"linear and gelu {how}; largest difference from torch {error:.1g}")
    return problem(name, f"linear and gelu {how} differ from torch by {error:.3g}", WRONG)
