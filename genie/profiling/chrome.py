"""A recording as a document in the JSON Trace Event Format, which Perfetto and Chromium open.

Times in it are microseconds since the profile's start, with three decimals: whole nanoseconds.
"""

from __future__ import annotations

import os
import sys
from array import array
from itertools import pairwise
from typing import Any

import genie
from genie.profiling.recording import Place, ProgramTrace, Recording
from genie.wire.messages import RequestTrace

Event = dict[str, Any]


class _Tracks:
    """Numbers for processes and threads, and the events that name them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._processes: dict[tuple[str, int], int] = {}
        self._threads: dict[tuple[int, str], int] = {}

    def process(self, name: str, pid: int) -> int:
        """The process's own id, or one beyond any real one where another host's process has the same."""
        key = (name, pid)
        if key not in self._processes:
            number = pid
            if pid in self._processes.values():
                number = (1 << 22) + len(self._processes)
                name += f" (its pid is {pid} there)"
            self._name("process", name, number, 0, len(self._processes))
            self._processes[key] = number
        return self._processes[key]

    def thread(self, process: int, name: str) -> int:
        key = (process, name)
        if key not in self._threads:
            self._threads[key] = len(self._threads) + 1
            self._name("thread", name, process, self._threads[key], len(self._threads))
        return self._threads[key]

    def _name(self, kind: str, name: str, pid: int, tid: int, order: int) -> None:
        for what, args in (("name", {"name": name}), ("sort_index", {"sort_index": order})):
            self.events.append({"ph": "M", "name": f"{kind}_{what}", "pid": pid, "tid": tid, "args": args})


class _Document:
    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.tracks = _Tracks()
        self.events: list[Event] = []
        self._flows = 0
        self.client = self.tracks.process("client", os.getpid())

    def slice(self, name: str, pid: int, track: str, start: int, end: int, details: dict[str, Any]) -> None:
        self.events.append(
            {
                "ph": "X",
                "name": name,
                "cat": "genie",
                "pid": pid,
                "tid": self.tracks.thread(pid, track),
                "ts": self._us(start),
                "dur": (end - start) / 1e3,
                "args": {k: v for k, v in details.items() if v is not None},
            }
        )

    def arrow(self, *points: tuple[int, str, int]) -> None:
        """From slice to slice: process, track and a time within each."""
        self._flows += 1
        for i, (pid, track, at) in enumerate(points):
            event: Event = {
                "ph": "s" if i == 0 else "f" if i == len(points) - 1 else "t",
                "name": "program",
                "cat": "genie",
                "id": self._flows,
                "pid": pid,
                "tid": self.tracks.thread(pid, track),
                "ts": self._us(at),
            }
            if i:
                event["bp"] = "e"
            self.events.append(event)

    def _us(self, ns: int) -> float:
        return (ns - self._recording.start) / 1e3


def document(recording: Recording) -> dict[str, Any]:
    """The whole trace; ``otherData`` holds what is known of the clocks, and what is missing."""
    out = _Document(recording)
    # Tracks in the order of a program's way: its capture, then what its session's links do.
    for program in recording.programs:
        out.tracks.thread(out.client, _capture_track(program))
    for place in recording.places:
        if place.pid is not None:
            out.tracks.thread(out.client, place.client_track)
    for span in recording.spans:
        out.slice(span.name, out.client, span.track, span.start, span.end, span.details)
    requests = {
        (id(place), request.number): request for place in recording.places for request in place.requests
    }
    for program in recording.programs:
        request = requests.get((id(program.place), program.number))
        _client(out, program, request)
        if request is not None and program.place is not None and program.sent is not None:
            _arrow(out, program, program.place, request)
    for place in recording.places:
        pid = out.client if place.pid is None else out.tracks.process(place.process, place.pid)
        for request in place.requests:
            _server(out, place, pid, request)
    return {
        "traceEvents": out.tracks.events + out.events,
        "displayTimeUnit": "ms",
        "otherData": _other(recording),
    }


def _capture_track(program: ProgramTrace) -> str:
    return f"session {program.session}: capture"


def _client(out: _Document, program: ProgramTrace, request: RequestTrace | None) -> None:
    if program.captured is not None:
        details = {
            "program": program.number,
            "ops": program.ops,
            "template": request.template if request is not None else None,
            "first_sight": program.first_sight,
            "first_op": program.line,
            "handed_over_by": program.cause or None,
        }
        out.slice("capture", out.client, _capture_track(program), *program.captured, details)
    if program.sent is not None and program.place is not None:
        details = {
            "program": program.number,
            "bytes": program.nbytes,
            "first_sight": program.first_sight,
            "quiet": program.quiet,
        }
        out.slice("send", out.client, program.place.client_track, *program.sent, details)
    wait = program.wait
    if wait is not None and program.place is not None and wait.programs[-1] == program.number:
        name, told = f"wait ({wait.cause})" if wait.cause else "wait", {"programs": wait.programs}
        track = program.place.client_track
        out.slice(name, out.client, track, wait.start, wait.end, told | {"bytes": wait.nbytes})


def _arrow(out: _Document, program: ProgramTrace, place: Place, request: RequestTrace) -> None:
    assert program.sent is not None
    server = out.tracks.process(place.process, place.pid or 0)
    at = place.clock.to_ours(request.started_ns or request.received_ns)
    points = [(out.client, place.client_track, program.sent[0]), (server, place.track, at)]
    if program.wait is not None:
        # Just before the wait's end: a time on its edge belongs to no slice in some viewers.
        points.append((out.client, place.client_track, max(program.wait.start, program.wait.end - 1)))
    out.arrow(*points)


def _server(out: _Document, place: Place, pid: int, r: RequestTrace) -> None:
    ours = place.clock.to_ours
    received, finished = ours(r.received_ns), ours(r.finished_ns)
    identity = {"program": r.number, "ops": r.ops, "template": r.template or None, "nonce": r.nonce or None}
    name = "failed program" if r.failed else "program"
    out.slice(name, pid, place.track, received, finished, identity)
    if not r.started_ns:
        return
    started, ended = ours(r.started_ns), ours(r.ended_ns)
    out.slice("compile" if r.first_sight else "prepare", pid, place.track, received, started, {})
    out.slice("execute", pid, place.track, started, ended, identity)
    stamps = array("q", r.op_ns).tolist()
    names = place.op_names.get(r.template, [])
    for i, (begin, end) in enumerate(pairwise(stamps)):
        out.slice(names[i], pid, place.track, ours(begin), ours(end), {"instruction": i})
    out.slice("finish", pid, place.track, ended, finished, {})


def _other(recording: Recording) -> dict[str, Any]:
    servers = []
    for place in recording.places:
        if place.pid is None:
            continue
        clock = place.clock
        servers.append(
            {
                "server": place.process,
                "pid": place.pid,
                "session": place.track,
                "clock_offset_ns": [e.offset for e in (clock.start, clock.end) if e is not None],
                "clock_error_ns": clock.error,
                "drift_corrected": clock.end is not None,
                "dropped_requests": place.dropped,
                "lost": place.lost,
            }
        )
    return {
        "genie": genie.__version__,
        "python": sys.version.split()[0],
        "clock": "the client's time.perf_counter_ns; each server's is mapped by exchanges at both ends, "
        "true to clock_error_ns (half the shortest round trip)",
        "servers": servers,
        "limit": recording.limit,
        "dropped": recording.dropped + sum(p.dropped for p in recording.places if p.pid is None),
        "ops_timed": recording.ops,
        "device_synchronized_after_each_op": any(p.synchronized_ops for p in recording.places),
    }
