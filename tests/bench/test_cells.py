"""Which cells are collected, their ids and their order."""

from genie.bench.options import ROWS

WORKLOADS = """
import pytest

@pytest.mark.genie_workload("llm_prefill")
def test_prefill(benchmark, baseline, workload, measure): ...

def test_ordinary(): ...

@pytest.mark.genie_workload("llm_decode", gpu=[{"batch": 4}])
def test_decode(benchmark, baseline, workload, measure): ...
"""


def collected(pytester, *arguments):
    pytester.makepyfile(test_it=WORKLOADS)
    result = pytester.runpytest_inprocess("--collect-only", "-q", "--genie-device", "cpu", *arguments)
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_peers_run_last_and_ray_last_of_all(pytester):
    names = "ray,pytorch_rpc,genie_full,local_pytorch"
    assert collected(pytester, "--genie-profile", "cpu", "--genie-baselines", names) == [
        "test_ordinary",
        "test_prefill[local_pytorch]",
        "test_prefill[genie_full]",
        "test_decode[local_pytorch]",
        "test_decode[genie_full]",
        "test_prefill[pytorch_rpc]",
        "test_decode[pytorch_rpc]",
        "test_prefill[ray]",
        "test_decode[ray]",
    ]


def test_further_parameters_are_further_tests(pytester):
    names = collected(
        pytester, "--genie-profile", "gpu", "--genie-baselines", "local_pytorch", "-k", "decode"
    )
    assert names == ["test_decode[local_pytorch]", "test_decode[local_pytorch-batch4]"]


def test_all_baselines_by_default(pytester):
    assert len(collected(pytester, "--genie-profile", "smoke")) == 1 + 2 * 7


def test_every_baseline_decodes_one_and_four_sequences_in_the_gpu_profile(pytester):
    """With the compiled reference, right below what it is an alternative to; elsewhere it runs on request."""
    names = collected(pytester, "--genie-profile", "gpu", "-k", "decode")
    assert {name.removesuffix("]").partition("[")[2] for name in names} == {
        f"{row}{batch}" for row in ROWS for batch in ("", "-batch4")
    }
    first = [name for name in names if "-batch4" not in name]
    assert first[:2] == ["test_decode[local_pytorch]", "test_decode[local_compiled]"]
    asked = ("--genie-baselines", "local_compiled,genie_full", "-k", "decode")
    assert collected(pytester, "--genie-profile", "smoke", *asked) == [
        "test_decode[local_compiled]",
        "test_decode[genie_full]",
    ]
    assert "local_compiled" not in "".join(collected(pytester, "--genie-profile", "cpu"))


def test_the_compiled_reference_has_no_single_ops_and_says_why(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.genie_workload("microbenchmark")
        def test_ops(benchmark, baseline, workload, measure): ...
        """
    )
    arguments = ("--genie-profile", "smoke", "--genie-device", "cpu", "--genie-baselines", "local_compiled")
    result = pytester.runpytest_inprocess(*arguments, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*local_compiled: single ops: there is nothing to fuse*"])


def test_without_a_compiler_the_reference_is_skipped_with_its_reason(pytester, cells, monkeypatch):
    arguments = cells()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    result = pytester.runpytest_subprocess(*arguments, "-rs", "--genie-baselines", "local_compiled")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*local_compiled is not available: torch.compile needs a C++ compiler*"])


def test_the_microbenchmark_is_skipped_where_weights_are_asked_for(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.genie_workload("microbenchmark")
        def test_ops(benchmark, baseline, workload, measure): ...
        """
    )
    checkpoints = str(pytester.mkdir("checkpoints"))
    arguments = ("--genie-profile", "smoke", "--genie-device", "cpu", "--genie-weights", checkpoints)
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(skipped=7)
    result.stdout.fnmatch_lines(
        ["*genie_full skipped:*", "*the microbenchmark is measured with seeded weights*"]
    )
