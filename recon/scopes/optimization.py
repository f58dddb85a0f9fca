"""Optimizers and learning-rate schedules: recipes to be filled in once the model is loaded, and the scopes' own."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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


LearningRate = float | Literal["auto"]
"""A peak learning rate, or `auto` for a choice by the scope."""


def require_rates(lr: LearningRate, weight_decay: float, betas: tuple[float, float], warmup: float) -> None:
    """Refuse options of a scope's own optimizer that it could not train with.

    Raises:
        ValueError: If one of them is out of range or no number.
    """
    rules = {
        "lr": (lr, lr == "auto" or 0 < lr < math.inf, "above 0 and finite, or auto"),
        "weight_decay": (weight_decay, 0 <= weight_decay < math.inf, "at least 0 and finite"),
        "betas": (list(betas), all(0 <= beta < 1 for beta in betas), "at least 0 and below 1, both of them"),
        "warmup": (warmup, 0 <= warmup <= 1, "from 0 to 1, a share of the steps"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"model.{name} must be {rule}, got {value}; correct it, or leave it out for the default")


def require_buildable(optimizer: OptimizerRecipe | None, lr_scheduler: LRSchedulerRecipe | None) -> None:
    """Make a chosen optimizer and schedule of one small parameter, and step them once.

    Raises:
        ValueError: If their options are refused.
    """
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    recipe: Any = optimizer
    option = "--optimizer"
    try:
        made = torch.optim.AdamW(parameters) if optimizer is None else optimizer(parameters)
        if lr_scheduler is not None:
            option, recipe = "--lr_scheduler", lr_scheduler
            schedule: Any = lr_scheduler(made)["scheduler"]
            made.step()  # schedules want it before theirs; without gradients it does nothing
            schedule.step(*([0.0] if isinstance(schedule, ReduceLROnPlateau) else []))
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        given = ", ".join(f"{name} {value}" for name, value in recipe.options.items()) or "none"
        raise ValueError(
            f"{option} needs options that {recipe} takes, got {given}: {error or type(error).__name__}; correct them"
        ) from error


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

    def factor(step: int) -> float:
        return rise_and_fall(step % period if period else min(step, num_steps), num_steps, warmup)

    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}


def rise_and_fall(step: int, num_steps: int, warmup: float) -> float:
    """The learning rate of a step as a share of the peak: linear warm-up, then linear decay to zero.

    Args:
        step: Number of the step, from 0.
        num_steps: Steps of the schedule.
        warmup: Share of the steps that warm up.
    """
    rising = max(1, round(warmup * num_steps))
    return min((step + 1) / rising, max(0.0, (num_steps - step) / max(1, num_steps - rising)))
