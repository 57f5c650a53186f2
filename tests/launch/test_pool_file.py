"""The file with a pool's addresses: whole or not there, waited for, and checked."""

import json
import threading

import pytest

from genie.errors import ConfigError, ConnectError
from genie.launch.pool_file import PoolFile, read_pool, remove_pool, write_pool

POOL = PoolFile(("10.0.0.1:7070", "[::1]:7071"), ("cpu:0 X", "cpu:1 X"), (11, 12), ("a", "b"))
OTHER = PoolFile(("10.0.0.1:7072",), ("cpu:0 X",), (13,), ("a",))


def test_what_is_written_is_read(tmp_path):
    write_pool(tmp_path / "pool.json", POOL)
    assert read_pool(tmp_path / "pool.json", 0) == POOL
    assert [path.name for path in tmp_path.iterdir()] == ["pool.json"]


def test_a_client_waits_for_the_file(tmp_path):
    path = tmp_path / "pool.json"
    writer = threading.Timer(0.3, write_pool, (path, POOL))
    writer.start()
    assert read_pool(path, 20) == POOL
    writer.join(5)


def test_a_file_that_does_not_come_is_an_error_that_names_the_remedy(tmp_path):
    with pytest.raises(ConnectError, match=r"within 0\.2 s.*genie serve --pool"):
        read_pool(tmp_path / "pool.json", 0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"addresses": []},
        {"addresses": ["10.0.0.1:7070"]},
        {"addresses": ["10.0.0.1", "10.0.0.2"]},
        {"pids": ["11", "12"]},
        {"hosts": None},
    ],
)
def test_a_file_that_names_no_pool_is_refused(tmp_path, change):
    path = tmp_path / "pool.json"
    write_pool(path, POOL)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="no pool file"):
        read_pool(path, 0)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(ConfigError, match="no pool file"):
        read_pool(tmp_path / "pool.json", 0)


def test_a_pool_removes_its_own_file_only(tmp_path):
    path = tmp_path / "pool.json"
    write_pool(path, OTHER)
    remove_pool(path, POOL)
    assert read_pool(path, 0) == OTHER
    remove_pool(path, OTHER)
    assert not path.exists()
    remove_pool(path)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="folder that exists"):
        write_pool(tmp_path / "absent" / "pool.json", POOL)
