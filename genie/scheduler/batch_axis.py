"""Where the batch lies in every value of a graph: proven from what each op means, never guessed from sizes.

`prove` reads the instructions in program order. Each family of ops has a rule (`batch_rules`), which says
where the rows of the batch are in the results, or that a result's rows depend on more than their own.
What depends on no row is the same in each part, and stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from genie.scheduler.batch_rules import rule_for
from genie.scheduler.batch_rules.elementwise import is_elementwise, is_inplace
from genie.scheduler.batch_rules.proof import TRUE, Proof, Refused, refused
from genie.scheduler.plan import BatchAxes
from genie.scheduler.where import Axis
from genie.srg.graph import Graph, Node
from genie.wire.messages import TensorSpec


def prove(graph: Graph, externals: Sequence[int]) -> BatchAxes | str:
    """The axes of all values, if the graph can run on some rows of a batch; else a text that says which
    instruction stands against it, and why.

    ``externals``: value numbers of those whose dimension 0 is the batch, of one size. All others are whole.
    The specs in ``graph`` must be those of the run that is to be split.
    """
    sizes = {tuple(graph.externals[-v - 1].specs[0].shape[:1]) for v in externals}  # type: ignore[union-attr]
    if len(sizes) != 1 or () in sizes:
        return f"the inputs have no common batch: sizes of their dimension 0 are {sorted(sizes)}"
    ((size,),) = sizes
    if size < 2:
        return f"a batch of {size} cannot be split"
    proof = Proof(graph, size)
    for node in graph.externals:
        proof.shape[node.outputs[0]] = node.specs[0].shape  # type: ignore[union-attr]
    for value in externals:
        proof.state[value] = ((TRUE, 0),)
    try:
        for instruction in graph.nodes:
            _read(proof, instruction)
        return _result(proof)
    except Refused as exc:
        return str(exc)


def _read(p: Proof, node: Node) -> None:
    inputs, outputs, state, shape = node.inputs, node.outputs, p.state, p.shape
    for value, spec in zip(outputs, node.specs, strict=True):
        if spec is None:
            raise refused(node, "has a shape that depends on data")
        shape[value] = spec.shape
    apply, always, keeps_counters, never = rule_for(node.op)
    if never:
        raise refused(node, never)
    if node.is_view:
        root = p.root.get(inputs[0], inputs[0])
        for value in outputs:
            p.root[value] = root
    if p.mixed and not p.mixed.keys().isdisjoint(inputs):
        _mix(p, node)
        return
    if p.counters and not keeps_counters and not p.counters.isdisjoint(inputs):
        p.all_whole(node, [v for v in inputs if v in p.counters], "computes with the numbers of rows")
    for value in inputs:
        if value in state:
            touched = True
            break
    else:
        touched = False
    if node.writes:
        _check_writes(p, node, touched)
    if apply is None:
        if touched:
            p.all_whole(node, inputs, "has no rule")
    elif touched or always:
        apply(p, node)
        if keeps_counters and inputs and inputs[0] in p.counters:
            p.counters.update(outputs)
        if p.mixed and node.leaves:
            for value in outputs:
                if value in p.mixed:
                    raise Refused(p.mixed[value])


def _mix(p: Proof, node: Node) -> None:
    """What comes of a sum over all rows is wrong in every part. That matters only if it is used: programs
    also hold tests whose answers the client knew already."""
    why = next(p.mixed[v] for v in node.inputs if v in p.mixed)
    if node.leaves or not is_elementwise(node.name) or node.writes or not node.outputs:
        raise Refused(why)
    for value in (*node.inputs, *node.outputs):
        if p.shape[value]:
            raise Refused(why)
    for value in node.outputs:
        p.mixed[value] = why


def _check_writes(p: Proof, node: Node, touched: bool) -> None:
    for value in node.writes:
        if p.root.get(value, value) < 0:
            raise refused(node, "writes to a value from outside the program")
        spec = p.graph.wiring.spec[value]
        if touched and spec is not None and any(
            n > 1 and not step for n, step in zip(spec.shape, spec.stride, strict=True)
        ):  # fmt: skip
            raise refused(node, "writes to memory that several elements share")
    if touched and not (is_inplace(node.name) and node.writes == node.inputs[:1]):
        p.all_whole(node, node.inputs, "writes to its arguments in a way that has no rule")


def _result(p: Proof) -> BatchAxes:
    true, shape = [p.find(variable) == TRUE for variable in range(p.variables)], p.shape
    known: dict[tuple[int, int], Axis] = {}
    axes: dict[int, Axis] = {}
    for value, tags in p.state.items():
        for variable, dim in tags:
            if not true[variable]:
                continue
            n = shape[value][dim]
            axis = known.get((dim, n))
            if axis is None:
                if n % p.size or not n:
                    raise refused(p.graph.wiring.producer[value], f"makes {n} rows of a batch of {p.size}")
                axis = known[dim, n] = Axis(dim, n // p.size)
            if value in axes:
                raise refused(p.graph.wiring.producer[value], "has the batch in two dimensions of one result")
            axes[value] = axis
    counters = p.counters & axes.keys()
    for value in counters:
        node = p.graph.wiring.producer[value]
        if node.leaves:
            raise refused(node, "numbers the rows of the batch, and leaves the program")
    literals: dict[int, list[tuple[int, int]]] = {}
    for variable, number, position, inner in p.scaled:
        if true[variable]:
            literals.setdefault(number, []).append((position, inner))
    scaled = {n: tuple(found) for n, found in literals.items()}
    return BatchAxes(p.size, axes, scaled, frozenset(counters | p.mixed.keys()))


def part_literals(graph: Graph, axes: BatchAxes, rows: int) -> list[int]:
    """The literals of all instructions in program order, as a part of ``rows`` rows needs them."""
    literals: list[int] = []
    for node in graph.nodes:
        at = len(literals)
        literals.extend(node.literals)
        for position, inner in axes.literals.get(node.number, ()):
            literals[at + position] = rows * inner
    return literals


def part_spec(spec: TensorSpec, axis: Axis, rows: int, size: int) -> TensorSpec:
    """Geometry of ``rows`` of the ``size`` rows of a value, dense in the order of its dimensions.

    Raises ValueError if the axis does not fit the shape.
    """
    if spec.shape[axis.dim] != size * axis.inner:
        raise ValueError(
            f"dimension {axis.dim} of {spec.shape} does not hold {size} rows of {axis.inner} elements"
        )
    shape = list(spec.shape)
    shape[axis.dim] = rows * axis.inner
    # Of equal strides (dimensions of one element, expanded ones) the later dimension is the inner one.
    order = sorted(range(len(shape)), key=lambda d: (-spec.stride[d], d))
    stride, step = [0] * len(shape), 1
    for d in reversed(order):
        stride[d] = step
        step *= max(shape[d], 1)
    return TensorSpec(spec.dtype, shape, stride, 0)
