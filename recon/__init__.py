"""recon: repair pruned language models at four scopes and measure what each buys and costs.

Importing this package imports neither torch nor lightning; README.md beside this file is the map.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

FACE = {
    "allocation": "recon.pruning.allocation",
    "criteria": "recon.pruning.criteria",
    "patterns": "recon.pruning.patterns",
    "refinement": "recon.pruning.refinement",
    "strategies": "recon.distributed.strategies",
}
"""Short names that configurations and users write, such as `recon.criteria.Wanda`, and where they lead."""


API = ("prune", "recover")
"""Functions for a live model, in `recon.cli.api`."""


class _Face(MetaPathFinder, Loader):
    """Imports modules by their short names, also where an earlier version has left a directory of that name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in FACE else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(FACE[module.__name__.rpartition(".")[2]])


sys.meta_path.insert(0, _Face())


def __getattr__(name: str) -> Any:
    if name in FACE:
        return import_module(FACE[name])
    if name in API:
        return getattr(import_module("recon.cli.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
