"""The suite is run like the stored run was: same cells, profile, rounds, devices and features."""

from genie.bench.gate.suite_run import suite_arguments
from tests.bench.gate.inputs import DEVICE, cell, result


def options(stored, cells=None):
    """The arguments as {option: value}, and what stands before the options."""
    arguments = suite_arguments(stored, cells)
    flag = arguments.index("--benchmark-only")
    rest = arguments[flag + 1 :]
    return arguments[:flag], dict(zip(rest[::2], rest[1::2], strict=True))


def test_the_stored_run_tells_its_options():
    pool = {"devices": [DEVICE, DEVICE]}
    where, chosen = options(result(cell("local_pytorch"), cell("genie_full", fingerprint=pool)))
    assert where == ["bench_tests"]
    assert chosen == {
        "--genie-profile": "smoke",
        "--genie-baselines": "local_pytorch,genie_full",
        "--genie-rounds": "5",
        "--genie-weights": "seeded",
        "--genie-device": "cpu",
        "--genie-servers": "2",
    }


def test_rounds_of_a_link_are_its_own():
    link = cell("genie_local_remote", workload="link", link={"raw_s": [1.0]}, rounds=(1.0,) * 500)
    _, chosen = options(result(cell("genie_full"), link))
    assert chosen["--genie-rounds"] == "5"


def test_features_switched_off_are_switched_off_again():
    plain, one, two = (
        cell("genie_full", workload=name, ablated=ablated)
        for name, ablated in (("decode", []), ("prefill", ["phases"]), ("vision", ["replay"]))
    )
    assert "--genie-ablate" not in options(result(plain))[1]
    assert options(result(one))[1]["--genie-ablate"] == "phases"
    assert options(result(plain, one, two, cell("local_pytorch")))[1]["--genie-ablate"] == "all"


def test_flagged_cells_are_named_one_by_one():
    assert options(result(cell()), ["a.py::test[x]"])[0] == ["a.py::test[x]"]
