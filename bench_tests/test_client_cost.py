"""What being transparent costs the client: capture, replay, sending; beside eager PyTorch's own dispatch.

Those marked ``genie_gated`` are the reduced set that ``genie gate --against`` measures in each process.
"""

import pytest

from genie.bench.client_cost import works

GATED = pytest.mark.genie_gated


@pytest.mark.parametrize(
    ("capture", "layers"),
    [
        pytest.param("lazy", 2, marks=GATED),
        pytest.param("replayed", 2, marks=GATED),
        ("lazy", 12),
        ("replayed", 12),
    ],
)
def test_decode_step(benchmark, client_cost, capture, layers):
    client_cost.measure(benchmark, works.DecodeSteps(layers), capture)


@pytest.mark.parametrize(
    ("capture", "layers"),
    [
        ("lazy", 12),
        ("replayed", 12),
        pytest.param("lazy", 48, marks=pytest.mark.genie_profiles("cpu", "gpu")),  # for its bytes
        pytest.param("replayed", 48, marks=pytest.mark.genie_profiles("gpu")),  # compiling takes a minute
    ],
)
def test_generate(benchmark, client_cost, capture, layers):
    client_cost.measure(benchmark, works.Generation(layers, rounds=7 if layers == 12 else 3), capture)


@GATED
def test_hot_ops(benchmark, client_cost):
    client_cost.measure(benchmark, works.HotOps())


@GATED
def test_ops_at_first_sight(benchmark, client_cost):
    client_cost.measure(benchmark, works.FirstSight())


@GATED
def test_send_program(benchmark, client_cost):
    client_cost.measure(benchmark, works.SendProgram())
