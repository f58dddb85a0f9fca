"""What was predicted before a run beside what it took."""

from collections.abc import Mapping
from typing import Any

from recon.report.groups import Group
from recon.report.schema import Report
from recon.report.sections import MISSING, Section, format_number

MIB = 2**20

Bytes = Mapping[str, int]
"""Category -> bytes."""

SHARDED = (
    "where a strategy shards, only what stays between the passes of a step is measured: what comes and goes is not"
)


def prediction_section(group: Group) -> Section | None:
    """Predicted and measured peaks: of one cell by category, of several their totals; None if nothing was predicted.

    Peaks are of live tensors: where there is no device, of those that would be on it. What libraries and the
    allocator take is in neither.
    """
    found = [(row.label, cell) for row in group.rows for cell in row.measured[:1] if "categories" in cell.prediction]
    shown = [(label, cell) for label, cell in found if _measured(cell, "device")]
    notes = [
        f"{row.label}: no prediction, for {cell.prediction['reason']}"
        for row in group.rows
        for cell in row.measured[:1]
        if "reason" in cell.prediction
    ]
    if not shown:
        return Section("predicted and measured", [""], [], notes) if notes else None
    if any(cell.prediction["setting"]["sharding"] not in ("none", "window_parallel") for _, cell in shown):
        notes.append(SHARDED)
    if len(shown) == 1:
        return _by_category(*shown[0], notes)
    header = ["scope", "device predicted", "measured", "ratio", "host predicted", "measured", "ratio"]
    rows = []
    for label, cell in shown:
        pairs = [(_total(_predicted(cell, side)), _total(_measured(cell, side))) for side in ("device", "host")]
        rows.append([label, *(text for pair in pairs for text in _compared(*pair, 1 / MIB))])
    return Section("predicted and measured peaks (MiB)", header, rows, notes)


def _by_category(label: str, cell: Report, notes: list[str]) -> Section:
    predicted, measured = _predicted(cell, "device"), _measured(cell, "device")
    names = [name for name in predicted if predicted[name] or measured.get(name)]
    rows = [[f"device: {name}", *_compared(predicted[name], measured.get(name, 0), 1 / MIB)] for name in names]
    for side in ("device", "host"):
        sizes = _total(_predicted(cell, side)), _total(_measured(cell, side))
        rows.append([f"{side}, peak", *_compared(*sizes, 1 / MIB)])
    seconds = cell.prediction["seconds"]
    rows.append(["seconds", *_compared(seconds, cell.seconds, 1)])
    if seconds is None and cell.seconds and cell.run_dir:
        rate = cell.prediction["flops"] / cell.seconds
        notes.append(f"{rate:.1e} FLOP/s: `recon plan --flop_rate {cell.run_dir}` predicts seconds at this rate")
    return Section(f"predicted and measured (MiB): {label}", ["", "predicted", "measured", "ratio"], rows, notes)


def _predicted(cell: Report, side: str) -> Bytes:
    return cell.prediction["categories" if side == "device" else "host"]


def _measured(cell: Report, side: str) -> Bytes:
    """On the device of the process that had most; on the host of all processes of a machine together."""
    found = [rank.get("tracked", {}).get(side, {}) for rank in cell.ranks]
    setting = cell.prediction["setting"]
    if side == "device" or len(found) != setting["world_size"]:  # jobs of their own know of themselves alone
        return max(found, key=_total, default={})
    return {name: sum(one.get(name, 0) for one in found) // setting["num_nodes"] for name in found[0]}


def _total(sizes: Bytes) -> int:
    return sum(sizes.values())


def _compared(predicted: float | int | None, measured: float | int, scale: float | int) -> list[str]:
    ratio: Any = MISSING if not predicted or not measured else format_number(predicted / measured, 2)
    texts = [MISSING if value is None else format_number(value * scale, 1) for value in (predicted, measured)]
    return [*texts, ratio]
