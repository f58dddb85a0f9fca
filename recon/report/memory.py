"""The memory of a process split into what ZeRO partitions and the rest, as a table beside that of the results."""

from collections.abc import Callable, Mapping
from typing import Any

from recon.report.estimates import estimate
from recon.report.groups import Group, Row
from recon.report.memory_phases import MIB, everything_else
from recon.report.schema import Report
from recon.report.sections import Section, show

Rank = Mapping[str, Any]
"""One of a report's `ranks`: peaks and split of one process."""


def memory_section(group: Group) -> Section | None:
    """The table of a group: per cell the largest figures over its processes, means over seeds; None if unmeasured.

    Peaks are those of the device if a cell of the group used one, else those of the host without the libraries.
    """
    rows = [row for row in group.rows if any(_peak(rank) is not None for cell in row.measured for rank in cell.ranks)]
    cells = [cell for row in rows for cell in row.measured]
    if not any(_is_split(rank) for cell in cells for rank in cell.ranks):
        return None
    has_device = any(_device_peak(rank) for cell in cells for rank in cell.ranks)
    is_offloaded = any((_offloaded(rank) or 0) > MIB for cell in cells for rank in cell.ranks)
    columns: dict[str, Callable[[Rank], int | None]] = {
        "weights": lambda rank: rank.get("weights_bytes"),
        "gradients": lambda rank: rank.get("gradients_bytes"),
        "optimizer": lambda rank: rank.get("optimizer_bytes"),
        "other": _everything_else,
        **({"peak device": _device_peak} if has_device else {"peak above libraries": _peak}),
    }
    notes = ["other: what the peak holds besides; each figure is the largest over processes"]
    if is_offloaded:
        columns["offloaded to host"] = _offloaded
        notes.append("what is offloaded to the host is part of the first three, and not of the peak")

    def strings(row: Row) -> list[str]:
        layouts = [str(len(cell.ranks)) for cell in row.measured], [_strategy(cell) for cell in row.measured]
        return [
            row.label,
            *("/".join(dict.fromkeys(values)) for values in layouts),
            *(
                show(estimate(_largest(cell, quantity) for cell in row.measured), scale=1 / MIB)
                for quantity in columns.values()
            ),
        ]

    header = ["scope", "processes", "strategy", *columns]
    return Section("memory per process (MiB)", header, [strings(row) for row in rows], notes)


def _largest(cell: Report, quantity: Callable[[Rank], int | None]) -> int | None:
    values = [value for rank in cell.ranks if (value := quantity(rank)) is not None]
    return max(values) if values else None


def _is_split(rank: Rank) -> bool:
    return rank.get("weights_bytes") is not None


def _device_peak(rank: Rank) -> int | None:
    return rank.get("peak_device_bytes") or None  # 0 where a run left the machine's device alone


def _peak(rank: Rank) -> int | None:
    if (on_device := _device_peak(rank)) is not None:
        return on_device
    host, baseline = rank.get("peak_host_bytes"), rank.get("baseline_host_bytes")
    return None if host is None or baseline is None else host - baseline


def _everything_else(rank: Rank) -> int | None:
    peak, on_device = _peak(rank), _device_peak(rank)
    if peak is None or not _is_split(rank) or (on_device is not None and rank.get("on_host_bytes") is None):
        return None
    return everything_else(rank, peak, on_device)


def _offloaded(rank: Rank) -> int | None:
    return rank.get("on_host_bytes") if _device_peak(rank) is not None else None


def _strategy(cell: Report) -> str:
    return str(cell.environment.get("strategy", "-"))
