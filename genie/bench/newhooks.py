"""Hooks of this plugin, for the ``conftest.py`` of a directory of cells or for another plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def pytest_genie_baselines(config: pytest.Config) -> Iterable[str]:  # type: ignore[empty-body]
    """Names of fixtures that are further baselines; each is a row after the seven, in every cell's table.

    A fixture returns a genie.baselines.protocol.Baseline whose ``name`` is the fixture's own; the same
    name is its id in ``--genie-baselines`` and in results. In a ``conftest.py`` the hook counts for the
    cells of that directory and below. A name that begins with ``genie_`` is held to what the harness
    asks of Genie itself: receipts that count ops, and byte counts of both ends that agree exactly.
    """
