"""The parts of a window that do not depend on each other: elements of a stream, or towers."""

from __future__ import annotations

from genie.scheduler.problem import Problem


def stream(problem: Problem) -> list[list[int]]:
    """The branches (instruction numbers of each) when all are one computation with the same weights on
    different inputs, as the micro-batches of a stream are; else empty."""
    return problem.flow.branches if problem.flow.is_stream else []


def towers(problem: Problem) -> list[list[int]]:
    """The branches when there are two or more that are not a stream."""
    found = problem.flow.branches
    return [] if len(found) < 2 or problem.flow.is_stream else found


def longest_first(seconds: list[list[float]], missing: list[list[int]]) -> list[int]:
    """Deals parts to devices, the longest first, each to where it would end first: ``seconds[device][part]``
    and bytes of weights that are not there (between equals, the fewer; then the lower index)."""
    parts = range(len(seconds[0]))
    end = [0.0] * len(seconds)
    dealt = [0] * len(seconds[0])
    for part in sorted(parts, key=lambda p: (-max(s[p] for s in seconds), p)):
        device = min(
            range(len(seconds)), key=lambda d: (end[d] + seconds[d][part], missing[d][part], end[d], d)
        )
        end[device] += seconds[device][part]
        dealt[part] = device
    return dealt
