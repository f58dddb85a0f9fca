"""Recipes of an optimizer and of a learning-rate schedule, whose parameters are known once the model is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class OptimizerRecipe:
    """A class of optimizers with options.

    Args:
        kind: The class.
        options: Arguments beside the parameters.
    """

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of `parameters`."""
        return self.kind(parameters, **self.options)

    def __str__(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True)
class LRSchedulerRecipe:
    """A class of learning-rate schedules with options.

    Args:
        kind: The class; of `ReduceLROnPlateau`, Lightning's, which says what it monitors.
        options: Arguments beside the optimizer.
    """

    kind: type[LRScheduler] | type[ReduceLROnPlateau]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Lightning's description of the schedule of `optimizer`: it steps when an epoch ends, as in LightningCLI."""
        schedule: Any = self.kind(optimizer, **self.options)
        monitor = {"monitor": schedule.monitor} if isinstance(schedule, ReduceLROnPlateau) else {}
        return {"scheduler": schedule, "interval": "epoch", **monitor}

    def __str__(self) -> str:
        return self.kind.__name__
