"""Single ops at many sizes: what the cost model predicts, against what is measured.

And the link under them: an empty round trip and an upload, each beside a raw socket.
"""

import pytest


@pytest.mark.genie_workload("microbenchmark")
def test_microbenchmark(benchmark, baseline, workload, measure):
    measure(benchmark, baseline, workload)


def test_empty_round_trip(benchmark, genie_link):
    genie_link.empty_round_trip(benchmark)


def test_upload_64mib(benchmark, genie_link):
    genie_link.upload_64mib(benchmark)
