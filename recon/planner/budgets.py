"""Epochs and steps that keep a run within a budget of tokens, FLOPs or seconds."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from recon.planner.flops import Kind, seconds_of
from recon.planner.options import PlanOptions
from recon.planner.prediction import Shape, flops_of
from recon.report.parts import Quantity

LONGEST = 2**20
"""Most epochs or steps that are looked at."""


def cost(shape: Shape, options: PlanOptions, quantity: Quantity, speeds: Mapping[Kind, float] | None = None) -> float:
    """What a run should need of a quantity.

    Args:
        shape: The model.
        options: The options of the run.
        quantity: `tokens` that training steps see, `flops` of all processes, or `seconds`.
        speeds: FLOP/s of one process, for seconds.
    """
    if quantity == "tokens":
        return float(options.train_tokens)
    flops = flops_of(shape, options)
    if quantity == "flops":
        return float(flops.total())
    assert speeds is not None
    return seconds_of(flops, speeds, options)


def longest_within(options: PlanOptions, limit: float, cost_of: Callable[[PlanOptions], float]) -> PlanOptions | None:
    """Train as long as a budget allows: whole epochs in local scopes, steps in full retraining.

    Args:
        options: The options of the run, with any length.
        limit: The budget.
        cost_of: The cost of a run.

    Returns:
        The options with another length; None if the shortest is too long.
    """

    def fits(length: int) -> bool:
        return cost_of(with_length(options, length)) <= limit

    if not fits(1):
        return None
    low, high = 1, 2
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return with_length(options, low)


def with_length(options: PlanOptions, length: int) -> PlanOptions:
    """The options with another number of epochs, or in full retraining of steps."""
    if options.is_local:
        return replace(options, epochs=length)
    return replace(options, max_steps=length, epochs=-(-length // options.steps_of_epoch))
