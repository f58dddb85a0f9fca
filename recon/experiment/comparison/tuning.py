"""Options chosen on the validation split: the points of a grid, and the best of what they reached."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recon.report import Report
from recon.report.tuning import brief

DIVERGED = "its perplexity is not finite"


@dataclass(frozen=True)
class Choice:
    """The options that an entry of a comparison is given.

    Args:
        options: Dotted options and values; none if nothing was tuned.
        tried: Every point as reports list it: `options`, `perplexity`, `seconds`, `chosen`, `error` if it failed.
        error: Why there is nothing to choose from.
    """

    options: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def grid(tune: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The product of all options' values, the last option varying fastest; nothing for no options."""
    if not tune:
        return []
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


def choose(points: Sequence[dict[str, Any]], outcomes: Sequence[Report | str]) -> Choice:
    """The point with the lowest validation perplexity, the first of several.

    Args:
        points: Options and values.
        outcomes: What each point measured, or why it failed. A point that failed or diverged is no candidate.
    """
    tried = [_tried(options, outcome) for options, outcome in zip(points, outcomes, strict=True)]
    if not tried:
        return Choice()
    candidates = [point for point in tried if point["perplexity"] is not None]
    if not candidates:
        first = tried[0]
        return Choice(
            tried=tried,
            error=f"tuning needs one point that can be measured, all {len(tried)} failed; the first, "
            f"{brief(first['options'])}: {first['error']}",
        )
    best = min(candidates, key=lambda point: point["perplexity"])
    best["chosen"] = True
    return Choice(best["options"], tried)


def _tried(options: dict[str, Any], outcome: Report | str) -> dict[str, Any]:
    point = {"options": options, "perplexity": None, "seconds": None, "chosen": False}
    if isinstance(outcome, str):
        return point | {"error": outcome}
    assert outcome.protocol["split"] == "validation", f"a choice must not see the {outcome.protocol['split']} split"
    point |= {"perplexity": outcome.perplexity, "seconds": outcome.seconds}
    return point if outcome.perplexity is not None else point | {"error": DIVERGED}
