"""What the harness accepts and what it refuses, cell by cell; a refused timing is never saved."""

import pytest

from genie.baselines.local_pytorch import LocalPytorch
from genie.bench.clock import cell_clock
from genie.bench.measurement import Cell
from genie.bench.options import Options
from genie.bench.session import BenchSession
from genie.config import IMPLEMENTED_FEATURES
from genie.errors import MeasurementError, ReceiptError, VerificationError, WireCountError
from tests.bench import tiny

pytestmark = pytest.mark.benchmark(timer=cell_clock)


@pytest.fixture
def session():
    options = Options(
        servers=1, addresses=(), token="", device="cpu", profile="smoke", weights="seeded",
        baselines=(), rounds={"": 4}, ablate=frozenset(),
    )  # fmt: skip
    return BenchSession(options, parallel=False)


def test_an_honest_cell_is_saved(session, benchmark):
    info = Cell(session, tiny.Remote(), tiny.Tiny("smoke")).measure(benchmark)
    assert not benchmark.has_error
    assert info["verified"] == {"ok": True, "kind": "allclose", "max_abs_err": 0.0}
    assert info["wire"] == {"bytes_out": 100, "bytes_in": 50, "round_trips": 1, "peer_bytes": 0}
    assert info["receipt"]["ops"] == 2
    assert info["setup_ms"].keys() == {"load", "upload", "capture", "warm"}
    assert info["features"] == list(IMPLEMENTED_FEATURES)


@pytest.mark.parametrize(
    ("cheater", "error", "message"),
    [
        (tiny.RandomOutput, VerificationError, "differs from local_pytorch"),
        (tiny.CachedAnswer, VerificationError, "differs from local_pytorch"),
        (tiny.HalfTheBatch, VerificationError, "was expected"),
        (tiny.OtherWeights, VerificationError, "other weights"),
        (tiny.NoReceipt, ReceiptError, "no receipt"),
        (tiny.OwnProcess, ReceiptError, "this very process"),
        (tiny.SameNonce, ReceiptError, "seen before"),
        (tiny.NoOps, ReceiptError, "no executed op"),
        (tiny.NothingSent, WireCountError, "needs at least"),
        (tiny.EndsDisagree, WireCountError, "counted 100 bytes and the servers 99"),
    ],
)
def test_a_dishonest_cell_is_an_error_and_not_saved(session, benchmark, cheater, error, message):
    with pytest.raises(error, match=message):
        Cell(session, cheater(), tiny.Tiny("smoke")).measure(benchmark)
    assert benchmark.has_error


def test_without_semantics_the_state_must_cross_the_wire(session, benchmark):
    with pytest.raises(WireCountError, match="needs at least 1064"):
        Cell(session, tiny.Remote("genie_no_semantics"), tiny.Tiny("smoke")).measure(benchmark)


def test_a_local_baseline_may_send_nothing(session, benchmark):
    sender = tiny.Remote("genie_capture_only")
    sender.remote = False
    with pytest.raises(ReceiptError, match="runs in this process, but brought a receipt"):
        Cell(session, sender, tiny.Tiny("smoke")).measure(benchmark)


def test_local_pytorch_is_judged_by_a_model_of_its_own(session, benchmark):
    local = LocalPytorch(session.local_slot)
    workload = tiny.Tiny("smoke")

    def spoil(*arguments):
        run = type(workload).run
        response = run(workload, *arguments)
        if arguments[0] is local._model:
            response.outputs["y"] += 1
        return response

    workload.run = spoil
    with pytest.raises(VerificationError, match="off by 1"):
        Cell(session, local, workload).measure(benchmark)


def test_the_saved_figure_is_the_time_of_the_requests(session, benchmark):
    cell = Cell(session, tiny.Remote(), tiny.Tiny("smoke", cases=("a", "b")))
    info = cell.measure(benchmark)
    if benchmark.enabled:
        assert benchmark.stats.stats.data == pytest.approx(cell.record.round_seconds())
        assert info["cases"].keys() == {"a", "b"}
        assert [timed.index for timed in cell.record.timed] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.benchmark(timer=lambda: 0.0)
def test_another_timer_is_refused(session, benchmark):
    if not benchmark.enabled:
        pytest.skip("nothing is timed under xdist")
    with pytest.raises(MeasurementError, match="timer of its own"):
        Cell(session, tiny.Remote(), tiny.Tiny("smoke")).measure(benchmark)
