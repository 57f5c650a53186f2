"""Ten ways to fool a benchmark of a remote accelerator, each refused, and for the right reason."""

import pytest

from genie.baselines.genie_remote import GenieFull
from genie.bench.clock import cell_clock
from genie.bench.measurement import Cell
from genie.bench.options import Options, features_without
from genie.bench.pool import StartedServers
from genie.bench.session import BenchSession
from genie.errors import ReceiptError, VerificationError, WireCountError
from tests.mutants import baselines

pytestmark = pytest.mark.benchmark(timer=cell_clock)
ROUNDS = 1
WITHOUT_RESIDENCY = ("residency",)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What the cells of a real run share, with a real server."""
    options = Options(
        servers=1, addresses=(), token="", device="cpu", profile="smoke", weights="seeded",
        baselines=(), rounds={"": ROUNDS}, ablate=frozenset(),
    )  # fmt: skip
    session = BenchSession(options, parallel=False)
    session.pool = StartedServers(session.server_slots, tmp_path_factory.mktemp("servers"))
    yield session
    session.pool.close()
    session.close()


@pytest.fixture
def measured(session, benchmark):
    """Measures a cell of a baseline's class as a run does; ``benchmark.has_error`` keeps it unsaved."""
    made = []

    def measure(kind, workload="llm_decode", ablated=(), **params):
        pool = session.pool
        if issubclass(kind, GenieFull):
            made.append(kind(pool.require(1), pool.token, features_without(ablated)))
        elif issubclass(kind, baselines.Forger):
            made.append(kind(session.local_slot, pool.pids))
        else:
            made.append(kind(session.local_slot))
        cell = Cell(session, made[-1], session.workload(workload, params), ablated)
        return cell, cell.measure(benchmark)

    yield measure
    for baseline in made:
        baseline.close()


@pytest.mark.parametrize("ablated", [(), WITHOUT_RESIDENCY], ids=["all features", "without residency"])
def test_the_honest_baseline_is_accepted(measured, benchmark, ablated):
    cell, info = measured(GenieFull, ablated=ablated)
    assert not benchmark.has_error
    for timed in cell.record.timed:
        assert timed.kernel.sent == timed.reply.wire.bytes_out > 0
        assert timed.kernel.received == timed.reply.wire.bytes_in > 0
    assert info["verified"]["ok"]


MUTANTS = [
    # 1 returns random output
    (baselines.RandomOutput, {"workload": "llm_prefill"}, VerificationError, "elements are off by up to"),
    # 2 runs locally under a remote name
    (baselines.LocalUnderARemoteName, {}, ReceiptError, "no receipt"),
    # 3 sends nothing
    (baselines.Forger, {}, WireCountError, "0 bytes counted out, but the request needs at least 256"),
    # 4 drops the prompt
    (baselines.DroppedPrompt, {}, VerificationError, r"8 of 8 generated ids differ"),
    # 5 simulates the network with sleep, and forges receipts and bytes
    (baselines.SleepingNetwork, {}, WireCountError, r"reports 14256 bytes out, but the kernel counted 0 "),
    # 6 swaps in a smaller model, and reports the hash of the right one
    (baselines.SmallerModel, {}, VerificationError, "generated ids differ"),
    # 7 replays a cached answer
    (baselines.CachedAnswer, {}, VerificationError, "8 of 8 generated ids differ"),
    (baselines.ReplayedAccount, {}, ReceiptError, "was seen before: an old answer came back"),
    # 8 has a feature flag that changes nothing
    (
        baselines.FlagThatChangesNothing,
        {"ablated": WITHOUT_RESIDENCY},
        ReceiptError,
        "residency was not really off",
    ),
    (
        baselines.FlagWithForgedCounters,
        {"ablated": WITHOUT_RESIDENCY},
        WireCountError,
        "bytes of state stayed where none may",
    ),
    (baselines.FlagThatIsAlwaysOff, {}, ReceiptError, "residency was not really on"),
    # 9 corrupts one token in a hundred; a request returns 104
    (baselines.OneTokenInAHundred, {"batch": 13}, VerificationError, "1 of 104 generated ids differ"),
    # 10 reports bytes that it did not send
    (baselines.MoreBytes, {}, WireCountError, r"reports (\d+) bytes out, but the kernel counted"),
    (baselines.FewerBytes, {}, WireCountError, r"reports (\d+) bytes out, but the kernel counted"),
    # and does its work after the timer has stopped
    (baselines.WorkAfterTheTimer, {}, VerificationError, "do not begin with the prompt"),
]
NEED_A_SECOND_REQUEST = (baselines.CachedAnswer, baselines.ReplayedAccount)


@pytest.mark.parametrize(
    ("mutant", "options", "error", "message"), MUTANTS, ids=[case[0].__name__ for case in MUTANTS]
)
def test_a_mutant_is_refused_for_what_it_does(measured, benchmark, mutant, options, error, message):
    if mutant in NEED_A_SECOND_REQUEST and not benchmark.enabled:
        pytest.skip("nothing is timed under xdist, and each cell makes one request")
    with pytest.raises(error, match=message):
        measured(mutant, **options)
    assert benchmark.has_error
