"""Compiled segments: TorchInductor in a child process, what it made loaded by the server.

    request thread     a program ran `WORTH_RUNS` times at fixed shapes: `Compiler.ask`
    compiler's thread  cuts it into segments (`genie.server.engines.segments`); for those that are not on disk
                       starts the child, waits, loads what it made, hands back one function (`Asked.run`)
    child              `python -m genie.server.engines.inductor`: lowest priority, ends with the server;
                       compiles each segment, runs it once (which tunes its kernels, and shows that it
                       runs at all), leaves `compiled.bin` beside `segment.json`

Compiling holds the interpreter's lock for seconds, which is why the server does not do it. What is left for
it is to import Inductor and to load, with threads changing often. On a CPU the child would take the cores
that requests run on: a server there has no compiler.

All of Inductor that is not documented is in this file: `standalone_compile` and `CompiledArtifact` of
`torch._inductor.standalone_compile` (torch 2.8 and later), and two settings of `torch._inductor.config`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from genie import cache
from genie.errors import GenieError
from genie.runtime.child_process import (
    ChildProcess,
    die_with_parent,
    report_ready,
    wait_for_end_of_input,
)
from genie.server.engines.emit import Run, emit
from genie.server.engines.segments import (
    Facts,
    NotCompilableError,
    from_text,
    joined,
    observe,
    segments,
    share_to_gain,
)

log = logging.getLogger("genie.server")

#: runs of a captured program before it is compiled
WORTH_RUNS = 16
#: of a program's estimated time that must be in kernels that can be fused
LEAST_TO_GAIN = 0.05
#: for that estimate: bytes/s, FLOP/s, and seconds that a kernel takes at least, of a data centre's GPU
BANDWIDTH, FLOPS, KERNEL_S = 3e12, 4e14, 2.5e-6
#: the child's time for one program
COMPILE_TIMEOUT_S = 600.0
#: of `torch._inductor.config`, beside its defaults
OPTIONS: dict[str, Any] = {}
#: niceness of the child
LOWEST_PRIORITY = 19
#: how often the interpreter changes threads while Inductor is imported or loads: requests wait that long
SWITCH_S = 2e-4

SEGMENT, COMPILED = "segment.json", "compiled.bin"


@dataclass
class Asked:
    """A program that is being compiled. ``run`` takes the placeholders' values, as the program does."""

    run: Run | None = None
    failed: str = ""
    child_s: float = 0.0
    load_s: float = 0.0

    @property
    def done(self) -> bool:
        return self.run is not None or bool(self.failed)


class Compiler:
    """Of one server and device. `prepare` and `ask` return at once and may be called from any thread."""

    def __init__(self, device: torch.device, options: dict[str, Any] | None = None) -> None:
        self._device = device
        self._options = OPTIONS if options is None else options
        self._root = cache.directory("inductor")
        self._loaded: dict[str, Callable] = {}  # by segment; used by the thread alone
        self._failed: set[str] = set()
        self._work: queue.SimpleQueue[tuple[fx.Graph, Facts, Asked] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Imports Inductor, which takes seconds, before somebody waits for it."""
        self._start()
        self._work.put(None)

    def ask(self, graph: fx.Graph, args: Sequence[Tensor]) -> Asked:
        """``args``: what the placeholders are bound to. The program runs with them once more, now."""
        asked = Asked()
        try:
            facts = observe(graph, args, self._device)
            share = share_to_gain(graph, facts, BANDWIDTH, FLOPS, KERNEL_S)
            if share < LEAST_TO_GAIN:
                raise NotCompilableError(f"{share:.0%} of its time is in kernels that could be fused")
        except (NotCompilableError, torch.OutOfMemoryError) as exc:
            asked.failed = str(exc)
            log.info("a program of %d calls is not compiled: %s", len(graph.nodes), exc)
            return asked
        self._start()
        self._work.put((graph, facts, asked))
        return asked

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                # The child dies with this thread: it lives as long as the process.
                self._thread = threading.Thread(target=self._compile_all, name="compiler", daemon=True)
                self._thread.start()

    def _compile_all(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # which GPU is the current one is a thread's own
        while True:
            work = self._work.get()
            if work is None:
                try:
                    with _often_switching():
                        _import_inductor()
                except ImportError as exc:
                    log.warning("this torch's Inductor cannot be used, nothing will be compiled: %s", exc)
                continue
            graph, facts, asked = work
            try:
                self._compile(graph, facts, asked)
            except Exception as exc:  # noqa: BLE001 - logged; the program runs as it did
                asked.failed = f"{type(exc).__name__}: {exc}"
                log.warning("a program of %d calls is not compiled: %s", len(graph.nodes), asked.failed)

    def _compile(self, graph: fx.Graph, facts: Facts, asked: Asked) -> None:
        with _often_switching():
            parts = segments(graph, facts)
        wanted = {s.text: self._folder(s.text) for s in parts}
        missing = [
            folder
            for text, folder in wanted.items()
            if text not in self._loaded and text not in self._failed and not (folder / COMPILED).exists()
        ]
        for text, folder in wanted.items():
            if folder in missing:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                (folder / SEGMENT).write_text(text)
        if missing:
            asked.child_s = self._run_child(missing)
        start = time.perf_counter()
        with _often_switching():
            for text, folder in wanted.items():
                if text not in self._loaded and text not in self._failed:
                    self._load(text, folder)
        asked.load_s = time.perf_counter() - start
        if not any(text in self._loaded for text in wanted):
            raise NotCompilableError("no segment of it could be compiled")
        asked.run = emit(joined(graph, parts, self._loaded))
        log.info(
            "a program of %d calls is compiled in %d segments, %d of them unlike: %.1f s, loaded in %.1f s",
            len(graph.nodes), len(parts), len(wanted), asked.child_s, asked.load_s,
        )  # fmt: skip

    def _folder(self, text: str) -> Path:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        threads = torch.get_num_threads() if self._device.type == "cpu" else 0
        made_for = (torch.__version__, str(self._device), name, threads, sorted(self._options.items()))
        return self._root / hashlib.sha256(f"{made_for}{text}".encode()).hexdigest()[:32]

    def _run_child(self, folders: list[Path]) -> float:
        start = time.perf_counter()
        # The log is what an error message quotes the end of.
        with tempfile.NamedTemporaryFile(prefix="compile-", suffix=".log") as output:
            child = ChildProcess(
                "genie.server.engines.inductor",
                [
                    *("--device", str(self._device), "--threads", str(torch.get_num_threads())),
                    *("--options", json.dumps(self._options)),
                    *map(str, folders),
                ],
                Path(output.name),
                _environment(self._root),
            )
            try:
                report = child.wait_ready(COMPILE_TIMEOUT_S)
            except GenieError as exc:
                raise NotCompilableError(f"the compiler's process failed: {exc}") from exc
            finally:
                child.stop()
        failures: Any = report["failed"]
        for folder, reason in failures.items():
            log.warning("a segment was not compiled, see %s: %s", Path(folder) / SEGMENT, reason)
        return time.perf_counter() - start

    def _load(self, text: str, folder: Path) -> None:
        path = folder / COMPILED
        if not path.exists():
            self._failed.add(text)
            return
        if path.stat().st_uid != os.getuid():  # it holds pickles
            raise NotCompilableError(f"{path} is another user's: remove it, or set GENIE_CACHE_DIR")
        os.environ.update(_environment(self._root))
        try:
            self._loaded[text] = load(path)
        except Exception as exc:  # noqa: BLE001 - torn, or another version's: the next server makes it anew
            log.warning("compiled code could not be loaded from %s: %s", path, exc)
            path.unlink(missing_ok=True)
            self._failed.add(text)


def _environment(root: Path) -> dict[str, str]:
    """Where Inductor and Triton keep what is not in an artifact (tuned configurations, binaries)."""
    own = root / "cache"
    return {"TORCHINDUCTOR_CACHE_DIR": str(own), "TRITON_CACHE_DIR": str(own / "triton")}


@contextmanager
def _often_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# -- Inductor --------------------------------------------------------------------------------------


def _import_inductor() -> Any:
    import torch._inductor.config

    # Compiling kernels in more processes would leave those behind.
    torch._inductor.config.compile_threads = 1
    import torch._functorch._aot_autograd.autograd_cache
    import torch._inductor.compile_fx
    import torch._inductor.standalone_compile

    # The function of that name hides the module.
    return sys.modules["torch._inductor.standalone_compile"]


def load(path: Path) -> Callable[..., Sequence[Tensor]]:
    """What `compile_segment` left. It takes the segment's inputs, and returns its outputs."""
    artifact = _import_inductor().CompiledArtifact.load(path=str(path), format="binary")

    def segment(*inputs: Tensor) -> Sequence[Tensor]:
        return artifact(*inputs)

    return segment


def compile_segment(folder: Path, device: torch.device, options: dict[str, Any]) -> None:
    """Compiles ``segment.json`` to ``compiled.bin``, and runs it once. Raises what Inductor raises."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module, specs = from_text((folder / SEGMENT).read_text())
    inputs = [_example(s.shape, s.stride, s.dtype, device) for s in specs]
    with torch.no_grad():
        flat = make_fx(module, tracing_mode="fake")(*inputs)
        artifact = _import_inductor().standalone_compile(
            flat, inputs, dynamic_shapes="from_example_inputs", options={"config_patches": options}
        )
        unfinished = folder / f"{COMPILED}.{os.getpid()}"
        artifact.save(path=str(unfinished), format="binary")
        artifact(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    unfinished.rename(folder / COMPILED)


def _example(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    # Zeros are in bounds wherever an index is taken; kernels' times do not depend on them.
    return torch.zeros(span, dtype=dtype, device=device).as_strided(shape, stride)


def main() -> int:
    """The child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: _end_all())
    die_with_parent(given.parent, signal.SIGTERM)
    threading.Thread(target=_end_with_input, daemon=True).start()
    os.nice(LOWEST_PRIORITY)
    torch.set_num_threads(given.threads)
    if given.device.type == "cuda":
        torch.cuda.set_device(given.device)
    failed = {}
    for folder in given.folders:
        try:
            compile_segment(folder, given.device, given.options)
        except Exception as exc:  # whatever it is: the server goes on without
            failed[str(folder)] = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
            logging.exception("compiling %s failed", folder)
    report_ready(given.ready_fd, {"failed": failed})
    return 0


def _end_with_input() -> None:
    wait_for_end_of_input()
    _end_all()


def _end_all() -> None:
    """This process with the C++ compilers that it started: it leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
