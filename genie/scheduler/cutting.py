"""Cuts a chain of instructions into stages, one after another, for servers in a given order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from genie.scheduler.placing import free_bytes
from genie.scheduler.problem import Problem

#: places to cut that are weighed against each other; more find no better balance, only slower
MAX_CUTS = 64


def stages(
    problem: Problem, chain: Sequence[int], servers: Sequence[int], reserve: int = 0, *, fit: bool = False
) -> list[int] | None:
    """Positions in ``chain`` (instruction numbers, ascending) where stages 1, 2, ... begin: stage s for
    ``servers[s]``. The longest stage, or move between two, takes the least time that the places worth
    cutting allow; with ``fit`` each stage's weights fit beside ``reserve`` bytes into what its server has
    left. None when there is no such cut.
    """
    crossing = _crossing(problem, chain)
    sums = {d: list(accumulate((problem.seconds[d][i] for i in chain), initial=0.0)) for d in servers}
    cuts = _worth(crossing, sums[servers[0]], MAX_CUTS if len(servers) <= 4 else MAX_CUTS // 2)
    ends = [0, *cuts, len(chain)]
    move_s = [_move_s(problem, crossing.get(p, 0)) for p in ends]
    weights = _weights(problem, chain, ends, servers) if fit else None

    def stage_s(a: int, b: int, server: int) -> float | None:
        if weights is not None and weights[server][a][b - a - 1] + reserve > free_bytes(problem, server):
            return None
        return sums[server][ends[b]] - sums[server][ends[a]]

    # best[b]: (longest so far, seconds of moves, first cuts) of the stages before end b
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    last = len(ends) - 1
    for index, server in enumerate(servers):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        final = index == len(servers) - 1
        for a, (longest, moves, chosen) in best.items():
            for b in (last,) if final else range(a + 1, last):
                seconds = stage_s(a, b, server) if a < b else None
                if seconds is None:
                    continue
                move = 0.0 if final else move_s[b]
                found = (max(longest, seconds, move), moves + move, (*chosen, ends[b]))
                if b not in reached or found < reached[b]:
                    reached[b] = found
        best = reached
    return list(best[last][2][:-1]) if last in best else None


def _move_s(problem: Problem, nbytes: int) -> float:
    cluster = problem.cluster
    return 0.0 if cluster.peer is None or cluster.nominal else cluster.peer.seconds(nbytes)


def _crossing(problem: Problem, chain: Sequence[int]) -> dict[int, int]:
    """Bytes that a cut before each position would move; positions where none may be are absent."""
    flow, root, prepared = problem.flow, problem.flow.root, problem.flow.preparation
    position = {number: p for p, number in enumerate(chain)}
    length = len(chain)
    change = [0] * (length + 1)
    forbidden = [0] * (length + 1)
    last: dict[int, int] = {}
    for p, number in enumerate(chain):
        for v in flow.inputs[number]:
            last[root[v]] = p
    for p, number in enumerate(chain):
        if flow.is_view[number] or number in prepared:
            continue
        for v in flow.outputs[number]:
            if last.get(v, -1) > p:
                change[p + 1] += flow.nbytes[v]
                change[last[v] + 1 if last[v] + 1 <= length else length] -= flow.nbytes[v]
    for group in flow.groups:
        inside = [position[i] for i in group if i in position]
        if len(inside) > 1:
            forbidden[inside[0] + 1] += 1
            forbidden[inside[-1] + 1 if inside[-1] < length else length] -= 1
    found: dict[int, int] = {}
    nbytes = blocked = 0
    for p in range(length):
        nbytes += change[p]
        blocked += forbidden[p]
        if p and not blocked:
            found[p] = nbytes
    return found


def _worth(crossing: dict[int, int], sums: list[float], limit: int) -> list[int]:
    """Of each of ``limit`` equal shares of the time the position with the least bytes, ascending."""
    total = sums[-1] or 1.0
    best: dict[int, tuple[int, int]] = {}
    for p, nbytes in crossing.items():
        share = min(int(sums[p] / total * limit), limit - 1)
        if share not in best or (nbytes, p) < best[share]:
            best[share] = (nbytes, p)
    return sorted(p for _, p in best.values())


def _weights(
    problem: Problem, chain: Sequence[int], ends: list[int], servers: Sequence[int]
) -> dict[int, list[list[int]]]:
    """Bytes of weights that a server lacks for the instructions between two ends: ``[server][a][b-a-1]``."""
    flow, where = problem.flow, problem.where
    used = [[v for i in chain[a:b] for v in flow.inputs[i] if v in flow.weights] for a, b in pairwise(ends)]
    result: dict[int, list[list[int]]] = {}
    for server in servers:
        rows: list[list[int]] = []
        for a in range(len(used)):
            seen: set[int] = set()
            total, row = 0, []
            for part in used[a:]:
                for v in part:
                    if v not in seen:
                        seen.add(v)
                        if v not in where or server not in where[v].servers:
                            total += flow.nbytes[v]
                row.append(total)
            rows.append(row)
        result[server] = rows
    return result
