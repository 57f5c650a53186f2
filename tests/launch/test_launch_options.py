"""The options that say who starts the servers, and where they are."""

import pytest

from genie.bench.launchers import Launch
from genie.bench.options import read_options
from genie.launch.bind import Bind
from genie.launch.pool_file import PoolFile, write_pool

TOKEN = {"GENIE_TOKEN": "secret"}
POOL = PoolFile(("10.0.0.1:7070", "10.0.0.2:7071"), ("cpu:0 X", "cpu:0 X"), (11, 12), ("a", "b"))


def options(pytester, *arguments):
    return read_options(pytester.parseconfig(*arguments), TOKEN)


def test_by_default_the_suite_starts_them(pytester):
    assert options(pytester).launch == Launch("local", "auto", "SPREAD", Bind())


def test_ray(pytester):
    arguments = ["--genie-launcher", "ray", "--genie-ray-address", "h:6379", "--genie-ray-placement", "PACK"]
    tls = ["--genie-tls-cert", "c.pem", "--genie-tls-key", "k.pem"]
    assert options(pytester, *arguments).launch == Launch("ray", "h:6379", "PACK", Bind())
    bind = options(pytester, *arguments, *tls).launch.bind
    assert bind.serve_args == ["--tls-cert", "c.pem", "--tls-key", "k.pem"]
    assert bind.ca == "c.pem"
    assert options(pytester, *arguments, "--genie-insecure").launch.bind.serve_args == ["--insecure"]


def test_a_pool_file_gives_addresses_and_pids(pytester):
    write_pool(pytester.path / "pool.json", POOL)
    read = options(pytester, "--genie-address", "pool.json", "--genie-tls-ca", "ca.pem")
    assert (read.addresses, read.pids) == (POOL.addresses, POOL.pids)
    assert read.launch.bind.tls_ca == "ca.pem"
    assert options(pytester, "--genie-address=@pool.json").addresses == POOL.addresses


def test_pytest_takes_the_lines_of_a_file_for_arguments(pytester):
    write_pool(pytester.path / "pool.json", POOL)
    with pytest.raises(pytest.UsageError, match=r"write --genie-address FILE\.json"):
        options(pytester, "--genie-address", "@pool.json")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--genie-launcher", "slurm"], "choose one of local, ray, torchrun"),
        (["--genie-launcher", "ray", "--genie-address", "127.0.0.1:1"], "give one of the two"),
        (["--genie-launcher", "ray", "--genie-ray-placement", "spread"], "choose one of SPREAD, PACK"),
        (["--genie-ray-placement", "PACK"], "only with --genie-launcher ray"),
        (["--genie-insecure"], "only with --genie-launcher ray"),
        (["--genie-launcher", "ray", "--genie-tls-cert", "c.pem"], "give both"),
        (["--genie-tls-ca", "c.pem"], "without --genie-tls-cert"),
        (["--genie-address", "absent.json", "--genie-pool-wait", "0.1"], "genie serve --pool"),
        (["--genie-address", "absent.json", "--genie-pool-wait", "soon"], "no number of seconds"),
    ],
)
def test_a_bad_value_names_its_remedy(pytester, arguments, remedy):
    with pytest.raises(pytest.UsageError) as raised:
        options(pytester, *arguments)
    assert remedy in str(raised.value)
