"""A written trace, read back: its spans by name and track, in whole nanoseconds."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Slice:
    name: str
    track: tuple[int, int]
    start: int
    end: int
    args: dict[str, Any]


class Trace:
    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        self.other = document["otherData"]
        self.events = document["traceEvents"]
        self.slices = [
            Slice(e["name"], (e["pid"], e["tid"]), ns(e["ts"]), ns(e["ts"]) + ns(e["dur"]), e["args"])
            for e in self.events
            if e["ph"] == "X"
        ]
        self.processes = {e["pid"]: e["args"]["name"] for e in self.meta("process_name")}
        self.threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in self.meta("thread_name")}

    def meta(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["ph"] == "M" and e["name"] == name]

    def named(self, name: str, track: tuple[int, int] | None = None) -> list[Slice]:
        return [s for s in self.slices if s.name == name and track in (None, s.track)]

    def server_tracks(self) -> list[tuple[int, int]]:
        return [t for t in self.threads if self.processes[t[0]].startswith("server")]

    def client_track(self, part: str) -> tuple[int, int]:
        (found,) = [t for t, name in self.threads.items() if part in name]
        return found

    def arrows(self) -> dict[int, list[dict[str, Any]]]:
        found = defaultdict(list)
        for e in self.events:
            if e["ph"] in "stf":
                found[e["id"]].append(e)
        return found

    def at(self, event: dict[str, Any]) -> list[Slice]:
        """The slices that an arrow's end is in, innermost last."""
        time, track = ns(event["ts"]), (event["pid"], event["tid"])
        found = [s for s in self.slices if s.track == track and s.start <= time <= s.end]
        return sorted(found, key=lambda s: s.start - s.end)

    def check(self) -> None:
        """What holds of every trace: named tracks, slices that nest, arrows that end where they should."""
        tracks = defaultdict(list)
        for s in self.slices:
            assert s.end >= s.start
            tracks[s.track].append(s)
        assert tracks.keys() <= self.threads.keys()
        assert len(set(self.threads.values())) == len(self.threads)
        for slices in tracks.values():
            open_: list[Slice] = []
            for s in sorted(slices, key=lambda s: (s.start, -s.end)):
                while open_ and open_[-1].end <= s.start:
                    open_.pop()
                assert not open_ or s.end <= open_[-1].end, f"{s} overlaps {open_[-1]}"
                open_.append(s)
        for arrow in self.arrows().values():
            assert "".join(e["ph"] for e in arrow) in ("stf", "sf")  # the latter: nobody waited for it
            ends = [self.at(e)[0].name.removeprefix("failed ").split()[0] for e in arrow]
            assert ends == ["send", "program", "wait"][: len(arrow)]


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)
