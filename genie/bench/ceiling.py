"""What several devices reach at best on this machine: their GEMM rate together, over one's alone.

Devices of one machine share memory, caches, power and (on a rented one) neighbours, so twice the
devices is less than twice the work. Speed-ups of cells that use several devices are read against this.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from statistics import median
from typing import TYPE_CHECKING, Any

from genie.errors import MeasurementError

if TYPE_CHECKING:
    from genie.devices import DeviceSlot

READY_SECONDS = 60.0
SPAN_SECONDS = 0.2
TURNS = 4


def measure_ceiling(slots: Sequence[DeviceSlot], span_seconds: float = SPAN_SECONDS) -> dict[str, Any]:
    """One pinned process per slot. The first alone and all together take turns; medians of the turns.

    Raises MeasurementError when a process fails or is silent. Plain JSON values.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_GemmProcess(slot)) for slot in slots]
        about = [process.answer(READY_SECONDS) for process in processes]
        alone, together = [], []
        for _ in range(TURNS):
            alone += _rates(processes[:1], span_seconds)
            together.append(_rates(processes, span_seconds))
    one, all_of_them = median(alone), median(map(sum, together))
    return {
        "devices": len(slots),
        "speedup": all_of_them / one,
        "one_gflops": one / 1e9,
        "all_gflops": all_of_them / 1e9,
        "each_gflops": [median(rates) / 1e9 for rates in zip(*together, strict=True)],
        "processes": about,
    }


def ceiling_line(ceiling: dict[str, Any]) -> str:
    """For the summary."""
    if "error" in ceiling:
        return f"what {ceiling['devices']} devices reach at most was not measured: {ceiling['error']}"
    return (
        f"{ceiling['devices']} devices reach at most {ceiling['speedup']:.2f}x of one here "
        f"(float32 GEMM: {ceiling['all_gflops']:.0f} against {ceiling['one_gflops']:.0f} GFLOP/s)"
    )


def _rates(processes: Sequence[_GemmProcess], seconds: float) -> list[float]:
    """FLOP/s of each process while all of ``processes`` work and the others wait."""
    for process in processes:
        process.ask(seconds)
    return [float(process.answer(seconds + READY_SECONDS)) for process in processes]


class _GemmProcess:
    """It ends with its stdin, so nothing of it outlives this process."""

    def __init__(self, slot: DeviceSlot) -> None:
        self._name = f"the GEMM process of {slot.type}:{slot.index}"
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "genie.bench.gemm_process",
                f"{slot.type}:{slot.index}", ",".join(map(str, slot.cores)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def ask(self, seconds: float) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise MeasurementError(f"{self._name} has ended: see its error above") from None

    def answer(self, within: float) -> Any:
        """Its next line. It writes whole lines and only when asked, so one is never left in a buffer."""
        stdout = self._process.stdout
        assert stdout is not None
        start = time.monotonic()
        ready, _, _ = select.select([stdout], [], [], within)
        line = stdout.readline() if ready else ""
        if not line:
            waited = time.monotonic() - start
            raise MeasurementError(
                f"{self._name} gave no answer ({'it ended' if ready else f'waited {waited:.0f} s'}): "
                "see its error above"
            )
        return json.loads(line)

    def __enter__(self) -> _GemmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it did not read before it ended
                    pipe.close()
