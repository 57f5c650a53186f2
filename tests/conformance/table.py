"""Writes docs/conformance.md: `python -m tests.conformance.table [--samples all] [--jobs N]`.

Runs every op of the operator database on device genie, in ``--jobs`` processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import genie
from tests.conformance import cases
from tests.conformance.checks import Report, run_op
from tests.conformance.expectations import (
    CATEGORIES,
    DEVIATIONS,
    EXPECTED,
    NO_REFERENCE,
    UNSUPPORTED,
    complaints,
)

#: every so many ops are also run on a server in another process
REMOTE_STEP = 18
PATH = Path(__file__).parents[2] / "docs" / "conformance.md"
COMMAND = "python -m tests.conformance.table --samples all"


def _start() -> None:
    torch.set_num_threads(1)
    genie.enable()


def _run(name: str, count: int) -> Report:
    with genie.local():
        return run_op(cases.OPS[name], count)


def lists() -> str:
    """The part of the page that follows from unsupported.toml alone."""
    lines = ["## Unsupported ops", ""]
    for category, why in CATEGORIES.items():
        names = [n for n, e in EXPECTED.items() if e.category == category]
        lines += [f"**{category}.** {why}", "", "| op | error |", "|---|---|"]
        for n in names:
            e = EXPECTED[n]
            until = f" (before torch {e.before})" if e.before else ""
            lines.append(
                f"| `{n}`{until} | {f'{e.error}: {e.message}' if e.error else 'nothing to compare with'} |"
            )
        lines.append("")
    lines += ["## Deviations", "", "| ops | what differs |", "|---|---|"]
    lines += [f"| {d.ops} | {d.what} |" for d in DEVIATIONS]
    return "\n".join(lines) + "\n"


def page(reports: dict[str, Report], samples: str, seconds: float, jobs: int) -> str:
    compared: Counter[str] = Counter()
    for r in reports.values():
        compared.update(r.compared)
    total = len(reports)
    absent = sum(1 for e in UNSUPPORTED.values() if e.category == NO_REFERENCE)
    refused = len(UNSUPPORTED) - absent
    failing = [n for n, r in reports.items() if complaints(n, r)]
    passed = total - absent - refused - len([n for n in failing if n not in UNSUPPORTED])
    wrong = sum(1 for r in reports.values() if r.wrong)
    by_error = [
        f"`{n}` ({count:,} {check})" for n, r in reports.items() for check, count in r.by_error.items()
    ]
    counts = ", ".join(f"{compared[c]:,} {c}" for c in ("forward", "in-place", "out", "backward"))
    return f"""# Conformance

PyTorch's own operator database (`torch.testing._internal.common_methods_invocations.op_db`) on device
`genie`, op by op, against the CPU: float32 and int64 where the op takes them; results, dtypes, shapes,
strides of views, aliasing, in-place forms, `out=` and, for float32, gradients.

Values must lie within the default tolerances of `torch.testing.assert_close`; integers must be equal; random
numbers are drawn under one seed. A float32 value outside those tolerances passes only if its error against
double precision is at most twice the CPU kernel's plus 16 ulp of the largest element (errors are the largest
over the tensor; an ulp is float32's machine epsilon times that element). Of `out=` no such value passes. The
table names the ops that need this: the backward of attention, which runs another kernel than on the CPU.

| | |
|---|---|
| torch | {torch.__version__} |
| ops in the database | {total} |
| pass | {passed} ({100 * passed / total:.1f} %) |
| refused with an error that names them | {refused} |
| without a CPU kernel to compare with | {absent} |
| silently wrong | {wrong} |
| samples compared | {counts} |
| of them passed by their error against double precision | {", ".join(by_error) or "none"} |
| samples per op and dtype | {samples} (at most {cases.ALL_SAMPLES}) |
| run time | {seconds:.0f} s in {jobs} processes |

Made by `{COMMAND}`. The same checks run as tests:
`pytest tests/conformance` takes {cases.DEFAULT_SAMPLES} samples per op and dtype, and runs every
{REMOTE_STEP}th op on a server process too; `--conformance-samples all` takes all samples.

Not covered: other dtypes. Of complex tensors, `conj()` is a copy on device `genie`, not a view: a later
write to either of the two does not reach the other.

{lists()}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="all", help="samples per op and dtype, or 'all'")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    count, started = cases.sample_count(options.samples), time.perf_counter()
    names = list(cases.OPS)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), _start) as pool:
        reports = dict(zip(names, pool.map(_run, names, [count] * len(names)), strict=True))
    failing = {n: complaints(n, r) for n, r in reports.items()}
    failing = {n: c for n, c in failing.items() if c}
    for name, found in failing.items():
        print(name, *found[:3], sep="\n  ", file=sys.stderr)
    if not failing:
        PATH.write_text(page(reports, options.samples, time.perf_counter() - started, options.jobs))
        print(f"wrote {PATH}")
    else:
        print(f"{len(failing)} ops are not as unsupported.toml says; nothing written", file=sys.stderr)
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
