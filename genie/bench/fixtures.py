"""The plugin's fixtures: pools that start when the first cell needs them, and one per baseline.

A baseline that this machine cannot have (a library is missing, a build lacks it) is skipped with
the reason; nothing ever runs in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from genie.bench.cells import baseline_of, cell_of
from genie.bench.features import require_ablatable
from genie.bench.options import features_without
from genie.bench.session import BenchSession, session_of
from genie.errors import ConfigError, MeasurementError

if TYPE_CHECKING:
    from genie.baselines.protocol import Baseline
    from genie.bench.client_cost.bench import ClientCostBench
    from genie.bench.link import LinkBench
    from genie.bench.pool import ServerPool
    from genie.workloads.protocol import Workload

#: the one baseline whose id is not its fixture's name
FIXTURE_NAMES = {"ray": "ray_actor"}
ROW = "genie_cell"
LINK = "genie_link"
CLIENT_COST = "genie_client_cost"


@pytest.fixture(scope="session")
def genie_session(request: pytest.FixtureRequest) -> Iterator[BenchSession]:
    """What the cells of this run share."""
    session = session_of(request.config)
    yield session
    session.close()


@pytest.fixture(scope="session")
def genie_servers(
    genie_session: BenchSession, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerPool]:
    """The pool of servers: started here, the controller's under xdist, or the user's own."""
    from genie.bench.launchers import start_elsewhere
    from genie.bench.pool import RunningServers, StartedServers

    options = genie_session.options
    shared = getattr(request.config, "workerinput", {}).get("genie_pool")
    pool: ServerPool
    if shared:
        pool = RunningServers(shared["addresses"], shared["token"], shared["pids"], shared["tls_ca"])
    elif options.addresses:
        pool = RunningServers(options.addresses, options.token, options.pids, options.launch.bind.tls_ca)
    elif options.launch.launcher != "local":
        pool = start_elsewhere(genie_session, tmp_path_factory.mktemp("genie-logs"))
    else:
        pool = StartedServers(genie_session.server_slots, tmp_path_factory.mktemp("genie-logs"))
    genie_session.pool = pool
    with closing(pool):
        yield pool


@pytest.fixture(scope="session")
def genie_rpc_pool(genie_session: BenchSession) -> Iterator[Any]:
    """Workers of ``torch.distributed.rpc``, one per device."""
    with _skipped_where_unavailable("pytorch_rpc"):
        from genie.baselines.pytorch_rpc import RpcPool

        pool = RpcPool(genie_session.server_slots)
        # Here, and not in the first cell: workers inherit the cores of the process that starts them.
        pool.start()
    with closing(pool):
        yield pool


@pytest.fixture(scope="session")
def genie_ray_pool(genie_session: BenchSession) -> Iterator[Any]:
    """A local Ray cluster with one actor per device."""
    with _skipped_where_unavailable("ray"):
        from genie.baselines.ray_actor import RayPool

        pool = RayPool(genie_session.server_slots)
        pool.start()
    with closing(pool):
        yield pool


@contextmanager
def _skipped_where_unavailable(baseline: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "genie":
            raise
        pytest.skip(f"{baseline} is not available: {error} (install it with this project's dependencies)")
    except ConfigError as error:
        pytest.skip(f"{baseline} is not available: {error}")


@pytest.fixture
def genie_link(
    request: pytest.FixtureRequest, genie_session: BenchSession, genie_servers: ServerPool
) -> LinkBench:
    """The link to the first server, beside a raw socket to a process on the same cores."""
    from genie.bench.link import LinkBench

    row: dict[str, Any] = {"case": request.node.name.removeprefix("test_").replace("_", " ")}
    request.node.user_properties.append((LINK, row))
    address = genie_servers.require(1)[0]
    if address.rpartition(":")[0].strip("[]") not in ("127.0.0.1", "localhost", "::1"):
        pytest.skip(f"the raw socket's peer is on this host, the server at {address} is not")
    return LinkBench(genie_session, genie_servers, row)


@pytest.fixture
def client_cost(
    request: pytest.FixtureRequest, genie_session: BenchSession, genie_servers: ServerPool
) -> ClientCostBench:
    """Genie's client beside eager PyTorch in this process; its programs run on the first server."""
    from genie.bench.client_cost.bench import ClientCostBench

    row: dict[str, Any] = {"case": request.node.name.removeprefix("test_").replace("_", " ")}
    request.node.user_properties.append((CLIENT_COST, row))
    return ClientCostBench(genie_session, genie_servers, row)


def _tls(servers: ServerPool) -> dict[str, Any]:
    """What a Genie baseline must be told of the pool's TLS; baselines of other revisions know of none."""
    return {} if servers.tls_ca is None else {"tls_ca": servers.tls_ca}


@pytest.fixture
def local_pytorch(genie_session: BenchSession) -> Iterator[Baseline]:
    """Plain PyTorch in this process."""
    from genie.baselines.local_pytorch import LocalPytorch

    with closing(LocalPytorch(genie_session.local_slot)) as baseline:
        yield baseline


@pytest.fixture
def local_compiled(genie_session: BenchSession) -> Iterator[Baseline]:
    """Reference: the best local idiom (static cache, torch.compile, CUDA graphs)."""
    with _skipped_where_unavailable("local_compiled"):
        from genie.baselines.local_compiled import LocalCompiled

        compiled = LocalCompiled(genie_session.local_slot)
    with closing(compiled) as baseline:
        yield baseline


@pytest.fixture
def genie_capture_only(genie_session: BenchSession) -> Iterator[Baseline]:
    """Capture, graph and annotation, executed in this process."""
    from genie.baselines.genie_capture_only import GenieCaptureOnly

    with closing(GenieCaptureOnly(genie_session.local_slot)) as baseline:
        yield baseline


@pytest.fixture
def genie_local_remote(genie_servers: ServerPool) -> Iterator[Baseline]:
    """Capture, executed by one server over loopback TCP."""
    from genie.baselines.genie_remote import GenieLocalRemote

    addresses = genie_servers.require(1)
    with closing(GenieLocalRemote(addresses, genie_servers.token, **_tls(genie_servers))) as baseline:
        yield baseline


@pytest.fixture
def genie_no_semantics(genie_servers: ServerPool) -> Iterator[Baseline]:
    """The pool, without knowing what anything means."""
    from genie.baselines.genie_remote import GenieNoSemantics

    addresses = genie_servers.require(len(genie_servers.addresses))
    with closing(GenieNoSemantics(addresses, genie_servers.token, **_tls(genie_servers))) as baseline:
        yield baseline


@pytest.fixture
def genie_full(
    request: pytest.FixtureRequest, genie_servers: ServerPool, genie_session: BenchSession
) -> Iterator[Baseline]:
    """The pool, with every semantic feature that was not ablated."""
    from genie.baselines.genie_remote import GenieFull

    options = genie_session.options
    cell = cell_of(request.node)
    ablated = cell["ablated"] if cell else options.ablate
    features = features_without(ablated)
    try:
        require_ablatable(ablated, len(genie_servers.addresses))
    except ConfigError as error:
        if not options.ablate_each:
            raise
        pytest.skip(str(error))
    addresses = genie_servers.require(len(genie_servers.addresses))
    told = _tls(genie_servers)
    if "cost_model" in features:
        told["costs"] = lambda: genie_session.pool_costs
    full = GenieFull(addresses, genie_servers.token, features, **told)
    with closing(full) as baseline:
        yield baseline


@pytest.fixture
def pytorch_rpc(genie_rpc_pool: Any) -> Iterator[Baseline]:
    """Peer: the model resident in RPC workers, the batch split by hand."""
    from genie.baselines.pytorch_rpc import PytorchRpc

    with closing(PytorchRpc(genie_rpc_pool)) as baseline:
        yield baseline


@pytest.fixture
def ray_actor(genie_ray_pool: Any) -> Iterator[Baseline]:
    """Peer: the model resident in Ray actors, the batch split by hand."""
    from genie.baselines.ray_actor import RayActor

    with closing(RayActor(genie_ray_pool)) as baseline:
        yield baseline


@pytest.fixture
def baseline(request: pytest.FixtureRequest) -> Baseline:
    """The cell's baseline, from the fixture of that name."""
    wanted = baseline_of(request.param)
    try:
        found: Baseline = request.getfixturevalue(FIXTURE_NAMES.get(wanted, wanted))
    except pytest.FixtureLookupError as error:
        if error.argname != wanted:
            raise
        raise ConfigError(
            f"pytest_genie_baselines names {wanted}, but no fixture has that name: define one that returns "
            "the baseline, in a conftest.py above the cells, or correct the name"
        ) from None
    if found.name != wanted:
        raise MeasurementError(f"the fixture of {wanted} returned a baseline that calls itself {found.name}")
    return found


@pytest.fixture
def workload(request: pytest.FixtureRequest, genie_session: BenchSession) -> Workload:
    """The cell's workload at the run's profile."""
    marker = request.node.get_closest_marker("genie_workload")
    return genie_session.workload(marker.args[0], request.param)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, genie_session: BenchSession
) -> Callable[[Any, Baseline, Workload], dict[str, Any]]:
    """``measure(benchmark, baseline, workload)``: times, verifies and records the cell."""
    from genie.bench.measurement import Cell

    def run(benchmark: Any, baseline: Baseline, workload: Workload) -> dict[str, Any]:
        row = dict(request.node.user_properties)[ROW]
        info = Cell(genie_session, baseline, workload, row["ablated"]).measure(benchmark)
        stats = benchmark.stats.stats if benchmark.enabled else None
        llm = info["llm"] if stats else None
        if stats:
            genie_session.most_devices = max(genie_session.most_devices, info["devices"])
            genie_session.timed_dtypes.add(info["model"]["dtype"])
        row |= {
            "workload": workload.name,
            "params": dict(workload.params),
            "verified": info["verified"]["kind"],
            "devices": info["devices"],
            "median_s": stats.median if stats else None,
            "iqr_s": stats.iqr if stats else None,
            "rounds": info["rounds"],
            "ratio": info["ratio_to_local"],
            "ttft_ms": llm["ttft_ms"] if llm else None,
            "tpot_ms": llm["tpot_ms"] if llm else None,
            "wire": info["wire"],
        }
        return info

    return run
