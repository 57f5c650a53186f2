"""A directory of cells for real pytest processes: the tiny workload, and baselines that stand in."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

CONFTEST = """
import pytest
from genie.bench.sweep import pytest_configure_node, pytest_xdist_make_scheduler
from tests.bench import tiny

def stand_in(name, made):
    @pytest.fixture(name=name)
    def fixture():
        return made
    return fixture

{overrides}
"""

CELLS = """
import pytest
from tests.bench.tiny import Tiny

@pytest.mark.genie_workload(Tiny, smoke=[{"batch": 4}])
def test_tiny(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
"""


@pytest.fixture
def cells(pytester, monkeypatch):
    """``cells(genie_full="RandomOutput")`` writes the directory, with stand-ins by fixture name."""

    def write(**overrides):
        lines = [f'{name} = stand_in("{name}", tiny.{made}("{name}"))' for name, made in overrides.items()]
        pytester.makeconftest(CONFTEST.format(overrides="\n".join(lines)))
        pytester.makepyfile(test_cells=CELLS)
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        return ("--genie-profile", "smoke", "--genie-device", "cpu")

    return write
