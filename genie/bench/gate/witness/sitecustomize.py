"""Python runs this at the start of every process that has this folder on its path.

It sees to it that all of ``genie`` comes from one place, and writes down from where: one file per
process, named by its pid, in the folder that GENIE_GATE_WITNESS names (see genie.bench.gate.process).

An editable install has a finder of its own, behind the ordinary one: a module that an older tree does
not have would come from the installed checkout, in the middle of the old package. Here it is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Witness:
    """The only finder of submodules of ``genie``."""

    recorded = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("genie."):
            return None
        if not self.recorded:
            self.recorded = True
            record = os.path.join(os.environ["GENIE_GATE_WITNESS"], str(os.getpid()))
            with open(record, "w", encoding="utf-8") as file:
                file.write(sys.modules["genie"].__file__ or "")
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            raise ModuleNotFoundError(f"no module {name!r} in {path}", name=name)
        return spec


if os.environ.get("GENIE_GATE_WITNESS"):
    sys.meta_path.insert(0, _Witness())
