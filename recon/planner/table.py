"""Predictions as a table, one row a scope."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from recon.basics.units import UNITS, readable
from recon.planner.flops import KINDS, PREPARATION
from recon.planner.prediction import Prediction, Shape
from recon.planner.proposals import Proposal, fits
from recon.profiling.entries import CATEGORIES
from recon.report.sections import MISSING, WIDEST, format_number

HEADERS = {"activations": "acti-\nvations", "calibration": "cali-\nbration", "gradients": "gra-\ndients"}
HEADERS |= {"optimizer": "opti-\nmizer", "gram": "Gram"}

LEGEND = {
    "activations": "activations: kept for the backward pass",
    "calibration": "calibration: hidden states of all sequences",
}

SNAPSHOTS = {
    "collect": "collect: sequences pass a block, and Gram matrices are summed up",
    "solve": "solve: one matrix is solved exactly (not with --model.start pruned)",
    "step": "step: the optimizer's update",
    "baselines": "baselines: the dense model is evaluated on a copy (not with --baselines false)",
    "evaluate": "evaluate: the recovered model is evaluated as it was written",
    "drift": "drift: the dense and the recovered model run side by side (not with --drift false)",
}


def print_plan(
    shape: Shape,
    predictions: Sequence[Prediction],
    console: Console,
    device_memory: int | None = None,
    proposals: Mapping[str, Sequence[Proposal]] | None = None,
) -> None:
    """Print the needs of each scope, whether they fit, and options that would.

    Args:
        shape: The model.
        predictions: The rows.
        console: The console.
        device_memory: Bytes of one device; adds the column `fits`.
        proposals: Scope -> proposals, for scopes that do not fit.
    """
    unit = "GiB" if max(one.peak.total for one in predictions) >= UNITS["GiB"] else "MiB"
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("scope", vertical="bottom")
    shown = [name for name in CATEGORIES if any(one.peak.held[name] for one in predictions)]
    names = [HEADERS.get(name, name) for name in shown]
    names += ["peak on\ndevice"] + (["fits"] if device_memory is not None else []) + ["when"]
    names += ["host", "disk", "FLOPs"] + (["time"] if any(one.seconds is not None for one in predictions) else [])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for one in predictions:
        peak = one.peak
        cells = [_amount(size, unit) for size in (*(peak.held[name] for name in shown), peak.total)]
        cells += [] if device_memory is None else ["yes" if fits(one, device_memory) else "no"]
        cells += [peak.name, *(_amount(sum(kind.values()), unit) for kind in (one.host, one.disk)), f"{one.flops:.1e}"]
        cells += [_time(one.seconds)] if "time" in names else []
        table.add_row(one.options.scope, *cells)
    console.print(Text(_title(shape, predictions), style="bold"))
    console.print(Text(f"{unit} on the device of each process when it holds most; beside it host memory and disk"))
    table.width = Measurement.get(console, console.options.update_width(WIDEST), table).maximum
    console.print(table, crop=False)
    notes = [LEGEND[name] for name in shown if name in LEGEND]
    notes += [SNAPSHOTS[name] for name in dict.fromkeys(one.peak.name for one in predictions) if name in SNAPSHOTS]
    console.print(Text("; ".join(notes)))
    console.print(Text("What CUDA and its allocator take for themselves and pruning are not in it."))
    _print_work(predictions, console)
    if device_memory is not None:
        _print_proposals(proposals or {}, console, device_memory)


def _print_work(predictions: Sequence[Prediction], console: Console) -> None:
    """Print the FLOPs of each part with their precision, speed and seconds; nothing without speeds."""
    timed = [one for one in predictions if one.speeds]
    if not timed:
        return
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for name in ("scope", "part", "products in"):
        table.add_column(name)
    for name in ("FLOPs", "TFLOP/s", "time"):
        table.add_column(name, justify="right")
    for one in timed:
        for kind in KINDS:
            if flops := one.flops_by_kind[kind]:
                speed = format_number(one.speeds[kind] / 1e12, 3 if one.speeds[kind] < 1e12 else 0)
                cells = kind, one.precisions[kind], f"{flops:.1e}", speed, _time(one.seconds_of(kind))
                table.add_row(one.options.scope, *cells)
    console.print()
    console.print(table)
    for one in timed:
        if one.preparation is not None:
            parts = f"{', '.join(PREPARATION[:-1])} and {PREPARATION[-1]}"
            console.print(Text(f"{one.options.scope}: {parts} take {one.preparation:.2f} of the time of training"))


def _title(shape: Shape, predictions: Sequence[Prediction]) -> str:
    options = [one.options for one in predictions]
    first = options[0]
    model = (
        f"{shape.name}, {shape.num_parameters:,} weights in {str(first.dtype or shape.stored).removeprefix('torch.')}"
    )
    sizes = " or ".join(dict.fromkeys(str(one.options.batch_size) for one in predictions))
    worlds = " or ".join(dict.fromkeys(str(one.options.world_size) for one in predictions))
    processes = "" if worlds == "1" else f", {worlds} processes"
    data = f"{first.num_sequences} sequences of {first.seq_len} tokens, {sizes} at a time"
    limits = [f"{one.trained_sequences:,} sequences a pass" for one in options if one.max_tokens is not None]
    limits += [f"at most {one.max_steps:,} steps" for one in options if one.max_steps is not None]
    if limits:
        data += f", full retraining {' and '.join(dict.fromkeys(limits))}"
    return f"{model}: {data}, {first.precision}{processes}"


def _print_proposals(proposals: Mapping[str, Sequence[Proposal]], console: Console, device_memory: int) -> None:
    for scope, found in proposals.items():
        if not found:
            console.print(Text(f"{scope}: nothing that was tried fits in {readable(device_memory)}"))
        for proposal in found:
            one = proposal.prediction
            sizes = f"{readable(one.peak.total)} on the device, {readable(sum(one.host.values()))} on the host"
            console.print(Text(f"{scope} fits with {' '.join(proposal.arguments)}  ({sizes})"))


def _amount(size: int, unit: str) -> str:
    value = size / UNITS[unit]
    return MISSING if size == 0 else format_number(value, 0 if value >= 100 else 1 if value >= 10 else 2)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
