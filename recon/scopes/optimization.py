"""The scopes' own learning-rate schedule, and recipes of other ones and of optimizers, which need a loaded model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


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


def warmup_and_linear_decay(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup: float, period: int | None = None
) -> dict[str, Any]:
    """Lightning's description of a per-step schedule: linear warm-up, then linear decay to zero.

    Args:
        optimizer: Whose learning rate is scheduled.
        num_steps: Steps of one schedule.
        warmup: Share of the steps that warm up.
        period: Start again after so many steps; never if None.
    """
    rising = max(1, round(warmup * num_steps))

    def factor(step: int) -> float:
        step = step % period if period else min(step, num_steps)
        return min((step + 1) / rising, max(0.0, (num_steps - step) / max(1, num_steps - rising)))

    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
