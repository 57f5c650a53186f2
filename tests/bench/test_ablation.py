"""``--genie-ablate all``: beside the full row, one more for each feature that is switched off alone."""

import pytest

from genie.bench.cells import ablated_in, rows_of
from genie.bench.options import read_options
from genie.config import IMPLEMENTED_FEATURES, POOL_FEATURES

#: what cannot work without a feature
WITH_STATE = (*POOL_FEATURES, "compiled", "run_ahead")
LOST = {"colocation": ("residency", *WITH_STATE), "residency": WITH_STATE}
#: the cells of a run that ablates each: (ablated, features)
ROWS = {
    "test_stateful[local_pytorch]": ([], []),
    "test_stateful[genie_full]": ([], list(IMPLEMENTED_FEATURES)),
} | {
    f"test_stateful[genie_full-no_{off}]": (
        [off],
        [f for f in IMPLEMENTED_FEATURES if f != off and f not in LOST.get(off, ())],
    )
    for off in IMPLEMENTED_FEATURES
}
#: what a pool of one server cannot show
NEEDS_TWO = ("colocation", *POOL_FEATURES)


@pytest.fixture(scope="module")
def pools(runs, servers):
    """(output, {name: benchmark}) on a pool of two, and on a pool of one."""
    runs.cells("Stateful")
    common = ["--genie-baselines", "local_pytorch,genie_full", "--genie-ablate", "all"]
    return runs(
        *(
            ({"GENIE_TOKEN": "right"}, ["--genie-address", ",".join(s.address for s in pool), *common])
            for pool in (servers, servers[:1])
        ),
        timeout=90,
    )


def test_each_feature_has_a_row_of_its_own(pools):
    _, saved = pools[0]
    assert list(saved) == list(ROWS)
    for name, (ablated, features) in ROWS.items():
        info = saved[name]["extra_info"]
        assert info["baseline"] == ("local_pytorch" if "local" in name else "genie_full")
        assert info["ablated"] == ablated
        assert info["features"] == ([] if "local" in name else features)
        assert info["ratio_to_local"] > 0


def test_an_ablated_row_moves_the_state_that_the_full_one_keeps(pools):
    _, saved = pools[0]
    full, without = (
        saved[f"test_stateful[genie_full{row}]"]["extra_info"]["wire"]["bytes_out"]
        for row in ("", "-no_residency")
    )
    assert without > full


def test_the_table_names_what_is_switched_off_after_the_full_row(pools):
    output, _ = pools[0]
    table = output[output.index("x local") :].splitlines()
    rows = [line.split("  ")[1] for line in table if line.startswith(("  genie_", "  local_"))]
    without = [f"genie_full -{feature}" for feature in IMPLEMENTED_FEATURES]
    assert rows == ["local_pytorch", "genie_full", *without]


def test_what_a_pool_of_one_cannot_show_is_skipped_with_its_reason(pools):
    output, saved = pools[1]
    assert list(saved) == [name for name in ROWS if not any(f"no_{off}" in name for off in NEEDS_TWO)]
    for off in NEEDS_TWO:
        assert f"genie_full -{off} skipped:" in output
        assert f"--genie-ablate {off} changes nothing on a pool of one server" in output
    assert "EXIT 0" in output


def test_the_cells_tell_what_servers_at_addresses_are(pools):
    for number, (_, saved) in zip((2, 1), pools, strict=True):
        remote = saved["test_stateful[genie_full]"]["extra_info"]["fingerprint"]
        local = saved["test_stateful[local_pytorch]"]["extra_info"]["fingerprint"]
        assert len(remote["devices"]) == number
        assert remote["devices"][0] == local["devices"][0], "the same machine, and as many cores"


def test_named_features_are_switched_off_in_the_one_row(pytester):
    options = read_options(pytester.parseconfig("--genie-ablate", "residency,colocation"), {})
    assert "genie_full" in rows_of(options)
    assert ablated_in("genie_full", options) == ["colocation", "residency"]
    assert ablated_in("genie_local_remote", options) == []


def test_all_stands_alone(pytester):
    with pytest.raises(pytest.UsageError, match="or all alone"):
        read_options(pytester.parseconfig("--genie-ablate", "all,residency"), {})
