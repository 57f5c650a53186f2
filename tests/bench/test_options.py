"""Every bad value is a usage error that names the remedy."""

import pytest
import torch

from genie.bench.options import BASELINES, read_options
from genie.config import IMPLEMENTED_FEATURES


def options(pytester, *arguments, **environ):
    return read_options(pytester.parseconfig(*arguments), environ)


def test_defaults(pytester):
    read = options(pytester)
    assert read.baselines == BASELINES
    assert read.features == set(IMPLEMENTED_FEATURES)
    assert read.profile is None
    assert read.rounds == {}


def test_rounds_for_all_and_for_single_workloads(pytester):
    assert options(pytester, "--genie-rounds", "7").rounds == {"": 7}
    assert options(pytester, "--genie-rounds", "7,vision_cnn=3").rounds == {"": 7, "vision_cnn": 3}


def test_baselines_keep_the_order_of_the_table(pytester):
    assert options(pytester, "--genie-baselines", "ray,local_pytorch").baselines == ("local_pytorch", "ray")


def test_a_reference_runs_where_it_is_asked_for_and_in_the_gpu_profile(pytester):
    assert options(pytester).rows("cpu") == BASELINES
    assert options(pytester).rows("gpu")[:2] == ("local_pytorch", "local_compiled")
    asked = options(pytester, "--genie-baselines", "ray,local_compiled")
    assert asked.rows("smoke") == asked.rows("gpu") == ("local_compiled", "ray")
    assert options(pytester, "--genie-baselines", "ray").rows("gpu") == ("ray",)


def test_an_ablated_feature_is_off(pytester):
    assert options(pytester, "--genie-ablate", "colocation").features == {"replay"}


def test_a_feature_that_a_revision_lacks_cannot_be_ablated(pytester, monkeypatch):
    older = tuple(name for name in IMPLEMENTED_FEATURES if name != "compiled")
    monkeypatch.setattr("genie.bench.options.IMPLEMENTED_FEATURES", older)
    with pytest.raises(pytest.UsageError, match="compiled is not implemented yet"):
        options(pytester, "--genie-ablate", "compiled")


def test_addresses_come_with_the_token_of_the_environment(pytester):
    read = options(pytester, "--genie-address", "127.0.0.1:7070,[::1]:7071", GENIE_TOKEN="secret")
    assert (read.addresses, read.token) == (("127.0.0.1:7070", "[::1]:7071"), "secret")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--genie-profile", "huge"], "choose one of smoke, cpu, gpu"),
        (["--genie-device", "tpu"], "choose one of auto, cpu, cuda"),
        (["--genie-baselines", "local_pytorch,rai"], "unknown baseline rai; choose from local_pytorch"),
        (["--genie-ablate", "caching"], "unknown feature caching; choose from residency, colocation"),
        (["--genie-servers", "0"], "not a whole number"),
        (["--genie-rounds", "many"], "not a whole number"),
        (["--genie-weights", "no/such/folder"], "nor a directory"),
        (["--genie-address", "127.0.0.1:7070"], "set GENIE_TOKEN"),
        (["--genie-address", "localhost"], "not HOST:PORT"),
    ],
)
def test_a_bad_value_names_its_remedy(pytester, arguments, remedy):
    with pytest.raises(pytest.UsageError) as raised:
        options(pytester, *arguments)
    assert remedy in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_a_usage_error(pytester):
    with pytest.raises(pytest.UsageError, match="no CUDA GPU"):
        options(pytester, "--genie-device", "cuda")


def test_pytest_exits_with_usage_error(pytester):
    result = pytester.runpytest_subprocess("--genie-profile", "huge")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--genie-profile: unknown value 'huge'; choose one of smoke, cpu, gpu*"])
