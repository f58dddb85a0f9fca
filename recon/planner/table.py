"""Predictions as a table, one row a scope."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from recon.planner.fitting import Proposal, fits
from recon.planner.memory import Prediction
from recon.planner.moment import CATEGORIES
from recon.report.sections import MISSING, format_number
from recon.report.table import WIDEST
from recon.units import UNITS, readable

HEADERS = {"optimizer": "optim.", "activations": "activ.", "calibration": "calib.", "gradients": "grads"}


def print_plan(
    title: str,
    predictions: Sequence[Prediction],
    console: Console,
    device_memory: int | None = None,
    proposals: Mapping[str, Sequence[Proposal]] | None = None,
) -> None:
    """Print what each scope needs, whether it fits, and what would.

    Args:
        title: The model and what is common to all rows.
        predictions: A row each.
        console: Where to.
        device_memory: Bytes; adds the column that says what fits.
        proposals: Scope -> settings that fit, for those that do not.
    """
    unit = "GiB" if max(one.peak.total for one in predictions) >= UNITS["GiB"] else "MiB"
    table = Table(box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
    table.add_column("scope", vertical="bottom")
    names = [HEADERS.get(name, name) for name in CATEGORIES]
    names += ["total"] + (["fits"] if device_memory is not None else []) + ["when", "host", "disk", "FLOPs"]
    names += ["time"] if any(one.seconds is not None for one in predictions) else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for one in predictions:
        peak = one.peak
        sizes = [*(peak.held[name] for name in CATEGORIES), peak.total]
        cells = [_amount(size, unit) for size in sizes]
        cells += [] if device_memory is None else ["yes" if fits(one, device_memory) else "no"]
        cells += [peak.name, *(_amount(sum(kind.values()), unit) for kind in (one.host, one.disk)), f"{one.flops:.1e}"]
        cells += [_time(one.seconds)] if "time" in names else []
        table.add_row(one.setting.scope, *cells)
    console.print(Text(title, style="bold"))
    console.print(Text(f"{unit} on the device of each process at its worst moment; host and disk beside it"))
    table.width = Measurement.get(console, console.options.update_width(WIDEST), table).maximum
    console.print(table, crop=False)
    for scope, found in (proposals or {}).items():
        if device_memory is None:
            break
        if not found:
            console.print(Text(f"{scope}: nothing that was tried fits in {readable(device_memory)}"))
        for proposal in found:
            total = readable(proposal.prediction.peak.total)
            console.print(Text(f"{scope} fits with {' '.join(proposal.options)}  ({total}, {proposal.kind})"))


def _amount(size: int, unit: str) -> str:
    value = size / UNITS[unit]
    return MISSING if size == 0 else format_number(value, 0 if value >= 100 else 1 if value >= 10 else 2)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
