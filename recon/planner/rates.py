"""FLOP/s of a device by precision, and the precision of every part of a run."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from recon.planner.flops import KINDS, Kind
from recon.planner.options import PlanOptions

Precision = Literal["bf16", "tf32", "fp32"]
"""Precision of products: `bf16` stands for 16 bits of either kind; sums are in fp32 throughout."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Rates = Mapping[Precision, float]
"""Precision -> FLOP/s of one device."""


def as_rates(given: Mapping[str, float]) -> Rates:
    """Check rates that a user gave.

    Raises:
        ValueError: Unless there is a rate above zero for every precision, and nothing else.
    """
    if set(given) != set(PRECISIONS) or not all(rate > 0 for rate in given.values()):
        raise ValueError(
            f"--rates needs FLOP/s above zero for {', '.join(PRECISIONS)}, got {dict(given)}; begin with "
            f"configs/devices/h100.yaml"
        )
    return {precision: float(given[precision]) for precision in PRECISIONS}


def precisions(options: PlanOptions, stored: torch.dtype) -> dict[Kind, Precision]:
    """Tell the precision in which each part of a run multiplies.

    Args:
        options: The options of the run.
        stored: Precision of the working weights outside the training of windows.
    """
    passed: Precision = "bf16" if stored.itemsize == 2 else "fp32"
    trained: Precision = "bf16" if options.half is not None else "fp32"
    found: dict[Kind, Precision] = dict.fromkeys(KINDS, trained)
    found |= {"walk": passed, "solve": "fp32", "start": "tf32", "gram": "fp32"}
    if options.collects_for_starts:
        found["gram"] = "bf16" if passed == "bf16" else "tf32"
    return found


def speeds_at(rates: Rates, options: PlanOptions, stored: torch.dtype) -> dict[Kind, float]:
    """FLOP/s of one process for every kind of FLOPs; arguments as those of `precisions`."""
    return {kind: rates[precision] for kind, precision in precisions(options, stored).items()}
