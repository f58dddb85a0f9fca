"""The mean of a quantity over seeds, and its spread."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """Mean of one quantity over seeds, and its sample standard deviation (None for a single seed)."""

    mean: float
    std: float | None


def estimate(values: Iterable[float | int | None]) -> Estimate | None:
    """Mean and sample standard deviation of the values that were measured; None if none was."""
    measured = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not measured:
        return None
    return Estimate(fmean(measured), stdev(measured) if len(measured) > 1 else None)
