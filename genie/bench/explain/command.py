"""``genie explain``: options. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from genie.bench.options import DEVICES, PROFILES, features_without
from genie.config import IMPLEMENTED_FEATURES, POOL_FEATURES
from genie.errors import ConfigError

HELP = "how genie_full schedules a workload, and (with --measure) what the alternatives take"

WORKLOADS = ("llm_decode", "llm_prefill", "vision_cnn", "multimodal_vqa", "microbenchmark")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("workload", choices=WORKLOADS, metavar="WORKLOAD", help=f"one of {', '.join(WORKLOADS)}")
    add("--profile", choices=PROFILES, help="sizes (default: gpu with CUDA, else cpu)")
    add("--device", choices=DEVICES, default="auto", help="default: auto")
    add("--servers", type=int, help="servers to start, one device each (default: as the suite)")
    add("--ablate", default="", metavar="FEATURE,...", help="features of genie_full to switch off")
    add("--memory-limit", default="0", metavar="BYTES[K|M|G]", help="what a session may hold on each server")
    add("--graph", action="store_true", help="print each window's annotated graph, too")
    add(
        "--measure",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="time this plan and every alternative to it, in turn, so often; print the regret",
    )
    add("--json", type=Path, metavar="FILE", help="write what was measured there")


def run(args: argparse.Namespace) -> int:
    ablated = [name.strip() for name in args.ablate.split(",") if name.strip()]
    unknown = sorted(set(ablated) - set(IMPLEMENTED_FEATURES))
    if unknown:
        raise ConfigError(
            f"--ablate: unknown feature {', '.join(unknown)}; choose from {', '.join(IMPLEMENTED_FEATURES)}"
        )
    if not {"colocation", "residency"} <= features_without(ablated):
        raise ConfigError(
            "--ablate: without colocation and residency nothing is scheduled: there is nothing to explain; "
            f"choose from {', '.join(POOL_FEATURES)}, replay, compiled, run_ahead"
        )
    if args.json and not args.measure:
        raise ConfigError("--json writes what --measure finds: give both")
    from genie.bench.explain.explaining import explain_workload

    return explain_workload(args, features_without(ablated))
