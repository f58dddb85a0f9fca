"""The picture of a run's memory: for every phase a bar, stacked from what was live at its peak."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recon.profiling.entries import CATEGORIES, Side
from recon.report.looks import CATEGORY_COLORS, CATEGORY_NAMES, DARK
from recon.report.memory_phases import MIB, Phase, describe, fold_windows, sides_of, tracked
from recon.report.plots.style import PNG_DPI, WIDTH, plain_style, save
from recon.report.sections import format_number

MANY_WINDOWS = 12
"""Windows up to which each one is drawn."""

ROW_INCHES, FRAME_INCHES, LEFT_INCHES = 0.27, 1.3, 2.3


def draw_memory(phases: Sequence[Phase], device: str, title: str, directory: Path) -> list[Path]:
    """Write `memory.png` and `memory.svg`: phases from top to bottom, one panel for each side.

    Args:
        phases: Of one process, as in `memory.json`.
        device: Where the run computed, as there.
        title: What the run is.
        directory: Where the picture goes.

    Returns:
        The files written; none if nothing was tracked.
    """
    sides = sides_of(phases)
    if not sides:
        return []
    folded = fold_windows(phases, MANY_WINDOWS, partial(tracked, side=sides[0]))
    shown = [phase for phase in folded if phase.get("categories")]
    with plain_style():
        height = FRAME_INCHES + len(sides) * (ROW_INCHES * len(shown) + 0.55)
        figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(sides), 1, squeeze=False)[:, 0]
        for axes, side in zip(panels, sides, strict=True):
            _draw_panel(axes, shown, side, device)
        used = {name for phase in shown for sizes in phase["categories"].values() for name in sizes if sizes[name]}
        handles, labels = panels[0].get_legend_handles_labels()
        of = dict(zip(labels, handles, strict=True))
        named = [CATEGORY_NAMES[name] for name in CATEGORIES if name in used]
        named += [label for label in labels if label.startswith("allocator")]
        figure.text(0.1 / WIDTH, 1 - 0.1 / height, title, size=11, weight="bold", va="top", color=DARK)
        figure.legend(
            [of[label] for label in named],
            named,
            loc="upper left",
            bbox_to_anchor=(0.03 / WIDTH, 1 - 0.32 / height),
            ncols=5,
            frameon=False,
            fontsize=8,
            handlelength=1.0,
            columnspacing=1.4,
        )
        figure.subplots_adjust(
            left=LEFT_INCHES / WIDTH, right=1 - 0.2 / WIDTH, bottom=0.5 / height, top=1 - 0.85 / height, hspace=0.35
        )
        return save(figure, directory, "memory")


def _draw_panel(axes: Axes, phases: Sequence[Phase], side: Side, device: str) -> None:
    rows = range(len(phases))
    left = [0.0] * len(phases)
    for name in CATEGORIES:
        sizes = [phase["categories"].get(side, {}).get(name, 0) / MIB for phase in phases]
        label = CATEGORY_NAMES[name]
        axes.barh(rows, sizes, left=left, height=0.72, color=CATEGORY_COLORS[name], label=label, linewidth=0)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    if side == "device" and device != "cpu":
        for key, look, label in (
            ("device_allocated_bytes", "|", "allocated"),
            ("device_reserved_bytes", ":", "reserved"),
        ):
            sizes = [(phase[key] or 0) / MIB for phase in phases]
            axes.plot(sizes, rows, look if look == "|" else "x", color=DARK, markersize=7, label=f"allocator: {label}")
            left = [max(start, size) for start, size in zip(left, sizes, strict=True)]
    largest = max(left)
    for row, phase in zip(rows, phases, strict=True):
        if (total := tracked(phase, side)) > 0:
            stage = phase["moment"][side]["stage"]
            text = f"{format_number(total / MIB, 1)}  {stage}".rstrip()
            axes.text(left[row] + 0.015 * largest, row, text, size=7.5, va="center", color=DARK)
    axes.set_xlim(0, 1.32 * largest)
    axes.set_yticks(rows, [str(phase["phase"]) for phase in phases], fontsize=8)
    axes.set_ylim(len(phases) - 0.4, -0.6)
    axes.set_xlabel(f"live tensors {describe(side, device)}, at the peak of a phase (MiB)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
