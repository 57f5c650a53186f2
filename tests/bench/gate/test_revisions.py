"""The two trees: what is in them, and what cannot be compared."""

import pytest

from genie.bench.gate.revisions import prepare, repository_of, resolve
from genie.errors import CannotCompareError
from tests.bench.gate.repositories import git, small


@pytest.fixture
def repository(tmp_path):
    return small(tmp_path / "repository")


def content(tree):
    return {
        str(path.relative_to(tree)): path.read_text()
        for path in tree.rglob("*")
        if path.is_file() and path.name != ".git"
    }


def test_the_old_side_is_its_runtime_under_the_current_harness(repository, tmp_path):
    with prepare("first", repository=repository, cache=tmp_path / "cache") as (old, new):
        assert content(new.tree) == {
            "genie/runtime.py": "runtime of second",
            "genie/bench/plugin.py": "harness of second",
            "genie/baselines/protocol.py": "harness of second",
            "genie/baselines/genie_remote.py": "wiring of second",
            "genie/errors.py": "harness of second",
            "bench_tests/test_cell.py": "harness of second",
        }
        assert content(old.tree) == content(new.tree) | {
            "genie/runtime.py": "runtime of first",
            "genie/baselines/genie_remote.py": "wiring of first",
        }
        assert old.commit == git(repository, "rev-parse", "first").strip()
    assert not old.tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_trees_are_left_with_keep(repository, tmp_path):
    with prepare("first", repository=repository, cache=tmp_path / "cache", keep=True) as (old, new):
        pass
    assert old.tree.exists()
    assert new.tree.exists()
    with prepare("first", repository=repository, cache=tmp_path / "cache"):
        pass  # what was left does not stand in the way
    assert not old.tree.exists()


def test_an_unknown_revision_is_named_with_the_remedy(repository):
    with pytest.raises(CannotCompareError, match=r"'no-such-rev'.*git fetch"):
        resolve(repository, "no-such-rev")


def test_a_revision_is_never_taken_for_an_option(repository):
    with pytest.raises(CannotCompareError, match="--all"):
        resolve(repository, "--all")


def test_changes_in_no_commit_are_refused_by_name(repository, tmp_path):
    (repository / "genie" / "runtime.py").write_text("edited")
    (repository / "new.py").write_text("untracked")
    with (
        pytest.raises(CannotCompareError, match=r"genie/runtime\.py, new\.py.*--allow-dirty"),
        prepare("first", repository=repository, cache=tmp_path / "cache"),
    ):
        pass


def test_allow_dirty_measures_a_copy_of_the_working_tree(repository, tmp_path):
    (repository / "genie" / "runtime.py").write_text("edited")
    (repository / "genie" / "bench" / "new.py").write_text("untracked")
    (repository / "bench_tests" / "test_cell.py").unlink()
    with prepare("first", repository=repository, cache=tmp_path / "cache", allow_dirty=True) as (old, new):
        (repository / "genie" / "runtime.py").write_text("edited during the run")
        assert new.dirty
        assert new.identity != new.commit
        assert content(new.tree)["genie/runtime.py"] == "edited"
        assert content(old.tree)["genie/runtime.py"] == "runtime of first"
        for tree in (old.tree, new.tree):
            assert content(tree)["genie/bench/new.py"] == "untracked"
            assert "bench_tests/test_cell.py" not in content(tree)


def test_equal_sides_for_the_gates_own_measurement(repository, tmp_path):
    (repository / "genie" / "runtime.py").write_text("edited")
    with prepare(None, repository=repository, cache=tmp_path / "cache", allow_dirty=True) as (one, other):
        assert content(one.tree) == content(other.tree)
        assert one.identity == other.identity


def test_two_gates_do_not_share_a_repository(repository, tmp_path):
    with (
        prepare("first", repository=repository, cache=tmp_path / "cache"),
        pytest.raises(CannotCompareError, match="another gate runs"),
        prepare("first", repository=repository, cache=tmp_path / "cache"),
    ):
        pass


def test_outside_a_repository_git_says_so(tmp_path):
    with pytest.raises(CannotCompareError, match="not a git repository"):
        repository_of(tmp_path)
