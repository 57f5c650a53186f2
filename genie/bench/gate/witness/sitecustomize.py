"""Python runs this at the start of every process that has this folder on its path.

It writes down which ``genie`` the process imports, when it imports it: one file per process, named by
its pid, in the folder that GENIE_GATE_WITNESS names (see genie.bench.gate.process).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _Witness:
    """Finds nothing. Asked for the first submodule of ``genie``, it notes where the package came from."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.startswith("genie.") and "genie" in sys.modules:
            sys.meta_path.remove(self)
            folder = os.environ["GENIE_GATE_WITNESS"]
            with open(os.path.join(folder, str(os.getpid())), "w", encoding="utf-8") as record:
                record.write(sys.modules["genie"].__file__ or "")


if os.environ.get("GENIE_GATE_WITNESS"):
    sys.meta_path.insert(0, _Witness())
