"""The phases of a run as `MemoryProfiler` wrote them to `memory.json`, and the table of what their bytes were."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from recon.profiling.entries import CATEGORIES, SIDES, Side
from recon.profiling.phases import WINDOW, is_window
from recon.report.sections import Section, format_number

MIB = 2**20

SPLIT = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
"""What `MemoryProfiler` measures before a step; `on_host_bytes` of all three lie in the host's memory."""

Phase = Mapping[str, Any]
"""One of the `phases` in `memory.json`."""

COLUMNS = {
    "weights": "weights",
    "gradients": "gradi-\nents",
    "optimizer": "opti-\nmizer",
    "activations": "kept for\nbackward",
    "calibration": "calib-\nration",
    "gram": "Gram",
    "masks": "masks",
    "other": "other",
}


def resident(phase: Phase) -> tuple[int, int]:
    """How large a phase was: on the device as its allocator says, then in the host's resident memory."""
    return phase["device_allocated_bytes"] or 0, phase["host_bytes"]


def everything_else(split: Mapping[str, Any], above_libraries: int, device_peak: int | None) -> int:
    """Bytes of a peak that are not weights, gradients or optimizer state, on the device if there is one.

    Args:
        split: The three figures of `SPLIT` and, with a device, `on_host_bytes`.
        above_libraries: Peak of the host without the libraries.
        device_peak: Allocated on the device; None or 0 without one.
    """
    if device_peak:
        return device_peak - (sum(split[name] for name in SPLIT) - split["on_host_bytes"])
    return above_libraries - sum(split[name] for name in SPLIT)


def fold_windows(phases: Sequence[Phase], most: int = 1, size: Callable[[Phase], Any] = resident) -> list[Phase]:
    """The phases, with all windows in one row if there are more than `most`: the largest, with the seconds of all.

    Args:
        phases: Of one process.
        most: Windows that are still shown one by one.
        size: What the largest is largest in.
    """
    windows = [phase for phase in phases if is_window(phase["phase"])]
    if len(windows) <= most:
        return list(phases)
    largest = max(windows, key=size)
    folded = {
        **largest,
        "phase": f"{len(windows)} windows, largest {str(largest['phase']).removeprefix(WINDOW)}",
        "seconds": sum(window["seconds"] for window in windows),
    }
    first = phases.index(windows[0])
    return [*phases[:first], folded, *(phase for phase in phases[first:] if not is_window(phase["phase"]))]


def tracked(phase: Phase, side: Side) -> int:
    """Bytes of all categories at the peak of one side; 0 if nothing was tracked there."""
    return sum(phase.get("categories", {}).get(side, {}).values())


def sides_of(phases: Iterable[Phase]) -> list[Side]:
    """Where bytes were tracked, the device first."""
    phases = list(phases)
    return [side for side in SIDES if any(tracked(phase, side) for phase in phases)]


def describe(side: Side, device: str) -> str:
    """What a table calls a side.

    Args:
        side: The side.
        device: Where the run computed, as in `memory.json`.
    """
    if device == "cpu":  # there was no device
        return "on the device, if there were one" if side == "device" else "on the host, if there were a device"
    return f"on {device}" if side == "device" else "on the host"


def phases_section(phases: Sequence[Phase], side: Side, device: str) -> Section:
    """The peak of every phase on one side, split by category, and when it was.

    Args:
        phases: Of one process.
        side: Which one.
        device: Where the run computed.
    """
    rows = []
    for phase in fold_windows(phases, size=partial(tracked, side=side)):
        if tracked(phase, side):
            sizes, moment = phase["categories"][side], phase["moment"][side]
            shown = [*(sizes.get(name, 0) for name in CATEGORIES), tracked(phase, side)]
            first = f"{phase['phase']}\n  {moment['stage']}" if moment["stage"] else str(phase["phase"])
            rows.append([first, *(format_number(size / MIB, 1) for size in shown)])
    header = ["phase, moment of the peak", *(COLUMNS[name] for name in CATEGORIES), "tracked"]
    notes = ["tracked: all live tensors, when they were most in a phase; the categories add up to it"]
    return Section(f"live tensors {describe(side, device)} (MiB)", header, rows, notes)
