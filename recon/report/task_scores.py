"""Scores on tasks as numbers: the main metric of each, their mean, and differences to the dense model."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

Tasks = Mapping[str, Mapping[str, Any]]
"""Name of each task -> its scores, as a report's `tasks` has them."""


def main_of(score: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Value and standard error of the main metric of a task."""
    metric = score["metrics"].get(score["main"], {})
    return metric.get("value"), metric.get("stderr")


def mean_of(tasks: Tasks, dense: Tasks) -> dict[str, float | None] | None:
    """The mean of the main metrics, each task counting once; None without tasks, or if one has no value.

    Args:
        tasks: Of a model.
        dense: Of the dense model.

    Returns:
        `value`; `stderr`, that of a mean of independent scores, None if one of them has none; and `delta`, the distance
        to the dense model's, None if that has other tasks.
    """
    values, errors = zip(*(main_of(one) for one in tasks.values()), strict=True) if tasks else ((), ())
    if not values or None in values:
        return None
    stderr = None if None in errors else sqrt(sum(one**2 for one in errors)) / len(errors)
    distances = deltas(tasks, dense)
    delta = sum(distances.values()) / len(distances) if len(distances) == len(tasks) == len(dense) else None
    return {"value": sum(values) / len(values), "stderr": stderr, "delta": delta}


def deltas(tasks: Tasks, dense: Tasks) -> dict[str, float]:
    """Main metrics minus those of the dense model, of each task that both were asked alike."""
    found = {}
    for name, score in tasks.items():
        if name not in dense or protocol_of(score) != protocol_of(dense[name]):
            continue
        value, reference = main_of(score)[0], main_of(dense[name])[0]
        if value is not None and reference is not None:
            found[name] = value - reference
    return found


def protocol_of(score: Mapping[str, Any]) -> dict[str, Any]:
    """How a task was asked: everything but the metrics."""
    return {name: value for name, value in score.items() if name != "metrics"}


def shown(value: float | None, stderr: float | None) -> str:
    """A score with its standard error, in per cent, for a page that shows one model."""
    if value is None:
        return "-"
    return f"{value:.2%}" + ("" if stderr is None else f" ± {stderr:.2%}")
