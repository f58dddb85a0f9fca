"""Optimizers and learning-rate schedules: recipes to be filled in once the model is loaded, and the scopes' own."""

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


def adamw(parameters: Iterable[torch.nn.Parameter], fused: bool, lr: float, **options: Any) -> torch.optim.AdamW:
    """AdamW, whose gradients Lightning may clip.

    Args:
        parameters: What learns.
        fused: Update all of a tensor in one kernel: on the host it takes a tenth of the time, and rounds otherwise.
        lr: Learning rate.
        **options: Of AdamW.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True if fused else None, **options)
    # A fused one offers to divide gradients by a loss scale itself, and Lightning then refuses to clip them; the scaler
    # of 16-mixed divides them before if it does not.
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


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
