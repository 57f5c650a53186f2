"""Which interpreter the old side runs with. Real virtual environments, real pip, and no index."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from genie.bench.gate.environment import dependencies_of, python_for
from genie.errors import CannotCompareError

METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"


def project(folder, *dependencies, pins=()):
    folder.mkdir()
    requires = ", ".join(f'"{one}"' for one in dependencies)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "p"\ndependencies = [{requires}]\n'
        '[project.optional-dependencies]\ntest = ["ruff>=0.1"]\n'
    )
    (folder / "constraints.txt").write_text("# measured with\n" + "".join(f"{pin}\n" for pin in pins))
    return folder


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def test_equal_dependencies_use_this_environment(tmp_path):
    old = project(tmp_path / "old", "torch>=2", pins=["torch==2.13.0", "ruff==1"])
    new = project(tmp_path / "new", "torch>=2", pins=["ruff==2", "torch==2.13.0  # the measured one"])
    assert str(python_for(old, new, tmp_path, pytest.fail)) == sys.executable


@pytest.mark.parametrize("change", [{"pins": ["torch==2.12.0"]}, {"dependencies": ["torch>=2", "rich"]}])
def test_other_pins_or_dependencies_are_another_environment(tmp_path, change):
    change = {"dependencies": ["torch>=2"], "pins": ["torch==2.13.0"]} | change
    one = project(tmp_path / "one", "torch>=2", pins=["torch==2.13.0"])
    other = project(tmp_path / "other", *change["dependencies"], pins=change["pins"])
    assert dependencies_of(one).key != dependencies_of(other).key


def test_other_dependencies_are_installed_once(tmp_path, wheel):
    old, new = project(tmp_path / "old", f"tiny @ {wheel.as_uri()}"), project(tmp_path / "new")
    told = []
    python = python_for(old, new, tmp_path / "cache", told.append)
    subprocess.run([python, "-c", "import tiny"], check=True, timeout=30)
    assert python_for(old, new, tmp_path / "cache", told.append) == python
    assert ["once" in told[0], "used again" in told[1]] == [True, True]


def test_what_pip_says_is_shown(tmp_path):
    old = project(tmp_path / "old", f"absent @ {(tmp_path / 'absent-1.0-py3-none-any.whl').as_uri()}")
    with pytest.raises(CannotCompareError, match=r"cannot be installed[\s\S]*absent-1\.0"):
        python_for(old, project(tmp_path / "new"), tmp_path / "cache", lambda _: None)


def test_trees_without_dependencies_of_their_own_use_the_current_interpreter(tmp_path):
    for side in ("old", "new"):
        (tmp_path / side).mkdir()
    assert python_for(tmp_path / "old", tmp_path / "new", tmp_path, print) == Path(sys.executable)


def test_a_tree_with_a_damaged_project_cannot_be_installed(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pyproject.toml").write_text("[project")
    with pytest.raises(CannotCompareError, match=r"pyproject\.toml"):
        dependencies_of(tmp_path / "old")
