"""The search for a learning rate: short trials on the middle window of each kind, judged by held-out error.

The best rate depends on the width of a model, its training, the pattern and the number of steps. Windows of one kind
are alike except those of the first blocks, so the one in the middle is tried for all. A search is a function of the
errors alone: it holds no tensor and knows no trainer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recon.models.windows import Window

FIRST_TIMES_WIDTH = 0.5
"""Rate that is tried first, times the width of the hidden states."""

GROWTH = 0.25
"""Power of a schedule's length with which its best rate grows: a long one decays what a high rate has upset."""

FACTOR = 2.0
"""Ratio of neighbouring rates."""

SHARE = 0.1
"""Share of a fit's training that the search may take."""

BACKWARD = 3
"""Cost of a training step in forward passes."""

HELD_OUT = 8
"""Most held-out sequences of a trial: all rates are judged by the same ones, so more tell no more."""

MOST_TRIALS, LEAST_TRIALS = 6, 3
"""Rates that are tried: three find the better direction, six reach a rate five factors away from the first."""

LONGEST = 0.25
"""Share of a window's steps beyond which a longer trial changes no choice."""

SHORTEST = 4
"""Steps of a trial below which fewer, longer trials are made."""


@dataclass(frozen=True)
class Budget:
    """The number and the length of the trials of a search.

    Args:
        trials: Largest number of rates to try, for each kind of window.
        steps: Optimizer steps of each.
        in_fit: Optimizer steps of a window in the fit.
    """

    trials: int
    steps: int
    in_fit: int

    @property
    def stretch(self) -> float:
        """Factor from the best rate of a trial to that of the fit."""
        return (self.in_fit / self.steps) ** GROWTH

    @classmethod
    def of(cls, steps: int, num_blocks: float, size: int, reach: int, of_step: int, num_held_out: int) -> "Budget":
        """Divide the share of a fit that a search may take, in forward passes of a sequence through a block.

        Args:
            steps: Optimizer steps of one window in the fit.
            num_blocks: Blocks that the fit trains, windows that overlap counted twice.
            size: Blocks that the tried windows, one of each kind, make up together.
            reach: Blocks up to the last of them, through which the sequences pass first.
            of_step: Sequences of an optimizer step, which costs three forward passes.
            num_held_out: Held-out sequences, for which each trial is a forward pass.
        """
        left = SHARE * BACKWARD * steps * of_step * num_blocks - num_held_out * reach
        longest = max(1, math.ceil(LONGEST * steps))
        for trials in range(MOST_TRIALS, LEAST_TRIALS - 1, -1):
            length = (left - trials * num_held_out * size) / (of_step * (BACKWARD * trials * size + reach))
            if length >= min(SHORTEST, longest):
                break
        return cls(trials, max(1, min(math.floor(length), longest)), steps)


@dataclass(frozen=True)
class Choice:
    """The learning rate of a kind of window, and what led to it.

    Args:
        lr: The rate.
        tried: Each rate with the held-out error after its trial, infinite where it diverged, in order.
        steps: Steps of a trial.
    """

    lr: float
    tried: Mapping[float, float]
    steps: int

    @property
    def summary(self) -> str:
        """The rate, and the errors of those that were tried, in a line."""
        tried = "  ".join(f"{lr:.3g}: {error:.4g}" for lr, error in self.tried.items())
        return f"{self.lr:.3g}, of held-out errors after {self.steps} steps of  {tried}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity."""
        tried = [{"lr": lr, "error": error if math.isfinite(error) else None} for lr, error in self.tried.items()]
        return {"lr": self.lr, "steps": self.steps, "tried": tried}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Choice":
        """The choice that `as_dict` wrote."""
        errors = {one["lr"]: math.inf if one["error"] is None else one["error"] for one in found["tried"]}
        return cls(found["lr"], errors, found["steps"])


def representatives(windows: Sequence[Window]) -> list[Window]:
    """The window of each kind that is tried for all of the kind: the middle one of those with the most blocks.

    Args:
        windows: All that the fit trains, in the order of depth, in which the chosen ones are returned, too.
    """
    kinds: dict[str, list[Window]] = {}
    for window in windows:
        kinds.setdefault(window.kind, []).append(window)
    chosen = []
    for kind in kinds.values():
        most = max(len(window.blocks) for window in kind)
        largest = [window for window in kind if len(window.blocks) == most]  # the last one may be shorter
        chosen.append(largest[len(largest) // 2])
    return sorted(chosen, key=windows.index)


def search(error_of: Callable[[float], float], first: float, budget: Budget, before: float = math.inf) -> Choice:
    """Walk from `first` towards lower errors on a geometric grid, and choose the rate at the bottom, for the whole fit.

    The grid has no end in either direction. A rate that diverges is an infinite error, from which the walk turns back.
    Only a rate with a worse one on either side grows with the length of the fit: nothing else is known of the bottom.

    Args:
        error_of: Held-out error after a trial at a rate; infinite if it diverged.
        first: Rate to try first.
        budget: Number of trials.
        before: Held-out error without training.
    """
    errors: dict[int, float] = {}

    def try_at(place: int) -> None:
        error = error_of(first * FACTOR**place)
        errors[place] = error if math.isfinite(error) else math.inf

    try_at(0)
    while len(errors) < budget.trials:
        best = min(errors, key=lambda place: (errors[place], place))
        untried = [place for place in (best - 1, best + 1) if place not in errors]
        if not untried:
            break
        try_at(untried[0])
    best = min(errors, key=lambda place: (errors[place], place))
    tried = {first * FACTOR**place: errors[place] for place in sorted(errors)}
    lr = first * FACTOR**best
    if best - 1 in errors and best + 1 in errors:
        lr *= FACTOR ** _vertex(errors[best - 1], errors[best], errors[best + 1]) * budget.stretch
    elif errors[best] > before:
        lr /= FACTOR  # the lowest of all is too high already
    return Choice(lr, tried, budget.steps)


def _vertex(below: float, best: float, above: float) -> float:
    """Where between -1/2 and 1/2 a parabola through three logarithms of errors has its minimum; 0 if one is missing."""
    if not all(math.isfinite(error) and error > 0 for error in (below, best, above)):
        return 0.0
    left, right = math.log(below / best), math.log(above / best)
    return 0.0 if left + right == 0 else (left - right) / (2 * (left + right))
