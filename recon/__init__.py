"""recon: repair pruned language models at four scopes and measure what each buys and costs.

Importing this package imports neither torch nor lightning; README.md beside this file is the map.
"""

from importlib import import_module
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


def __getattr__(name: str) -> Any:
    if name in FACE:
        return import_module(FACE[name])
    if name in API:
        return getattr(import_module("recon.cli.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
