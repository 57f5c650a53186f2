"""A directory of cells for real pytest processes: the tiny workload, and baselines that stand in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genie.devices import device_slot
from genie.runtime.server_process import start_servers

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


RUNNER = """
import json, os, sys
import pytest

for environ, arguments in json.loads(sys.argv[1]):
    os.environ.update(environ)
    print("RUN", flush=True)
    print("EXIT", int(pytest.main(arguments)), flush=True)
"""
FAULTY_CELLS = """
import pytest
from tests.bench.faulty import {workload}

@pytest.mark.genie_workload.with_args({workload}, {more})
def test_{name}(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)
"""


class Runs:
    """Several pytest runs in one real process, which imports torch once."""

    def __init__(self, folder):
        self.folder = folder

    def cells(self, workload, **more):
        text = FAULTY_CELLS.format(
            workload=workload, name=workload.lower(), more=", ".join(f"{k}={v!r}" for k, v in more.items())
        )
        (self.folder / f"test_{workload.lower()}.py").write_text(text)

    def __call__(self, *runs, timeout):
        """Each run is (environment, arguments). Returns [(output, {name: benchmark}), ...]."""
        plan = []
        for number, (environ, arguments) in enumerate(runs):
            common = ("--genie-profile", "smoke", "--genie-device", "cpu", "-p", "no:cacheprovider")
            plan.append((environ, [*arguments, *common, "--benchmark-json", f"{number}.json"]))
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, json.dumps(plan)],
            cwd=self.folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )  # fmt: skip
        outputs = done.stdout.split("RUN\n")[1:]
        assert len(outputs) == len(runs), done.stdout
        return [(output, self._saved(f"{number}.json")) for number, output in enumerate(outputs)]

    def _saved(self, name):
        # pytest-benchmark writes no file when it has nothing to save.
        path = self.folder / name
        benches = json.loads(path.read_text())["benchmarks"] if path.exists() else []
        return {bench["name"]: bench for bench in benches}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Two servers that the user started, which give each session 1 MiB; their token is "right"."""
    slots = [device_slot("cpu", index) for index in range(2)]
    started = start_servers(
        slots, token="right", log_dir=tmp_path_factory.mktemp("servers"),
        extra_args=["--memory-limit", "1M"],
    )  # fmt: skip
    yield started
    for server in started:
        server.close()
