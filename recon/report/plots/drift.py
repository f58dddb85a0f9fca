"""The picture of drift: error of the hidden state against depth, a line for each row of one group.

Drawn as the Pareto picture is: by matplotlib's object-oriented interface, with the same colours and markers. The legend
names the lines in the order of their right ends.
"""

import math
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from recon.report.drift import Curve, curves, protocol, split
from recon.report.estimates import Estimate
from recon.report.groups import Group
from recon.report.looks import LOOKS, REFERENCE, Look
from recon.report.plots.style import PNG_DPI, WIDTH, frame, height_of, legend, markers_of
from recon.report.sections import show

MOST_MARKERS = 13
"""Of a line; a deeper model has one at every second, third, ... block."""

LEAST_RATIO = 4.0
"""Of the largest to the smallest error that the axis shows: noise should not fill the picture."""

STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
"""Rows of one scope share its colour and marker; their lines differ."""


def draw_depth(group: Group) -> Figure | None:
    """The picture of one group; None if no drift was measured, or no row differs from the dense model."""
    rows = [curve for curve in curves(group) if any(_is_drawn(error) for error in curve.hidden)]
    if not rows:
        return None
    rows.sort(key=lambda curve: ["dense", "pruned", *LOOKS].index(curve.scope))  # smaller markers lie on top
    height = height_of(len(rows))
    figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
    FigureCanvasAgg(figure)
    frame(figure, group, split(group), _notes(group, rows), height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("after block")
    axes.set_ylabel("relative squared error of the hidden state (%)")
    _scale(axes, rows)
    markers = markers_of(group.rows)
    for curve, style in zip(rows, _styles(rows), strict=True):
        _draw(axes, curve, style, markers[curve.label])
    by_end = sorted(rows, key=_end, reverse=True)
    legend(figure, [axes], {curve.label: f"  KL {show(curve.kl, decimals=3, spread=True)}" for curve in by_end})
    return figure


def _end(curve: Curve) -> float:
    """The last error of a line."""
    return next(error.mean for error in reversed(curve.hidden) if error is not None and _is_drawn(error))


def _notes(group: Group, rows: list[Curve]) -> list[str]:
    notes = [
        "||h - h_dense||² / ||h_dense||² of what each block returns, in the whole model as it was written; KL per "
        f"predicted token, in nats. Measured on {protocol(group)}"
    ]
    if any(error is not None and error.mean == 0 for curve in rows for error in curve.hidden):
        notes.append("Errors of exactly 0 have no place on a logarithmic axis")
    notes += [f"Left out: {failure}" for failure in group.failures]
    return notes + [remark for remark in group.remarks if "violates its masks" in remark]


def _look(curve: Curve) -> Look:
    return LOOKS.get(curve.scope, REFERENCE)


def _styles(rows: list[Curve]) -> list:
    """A line style for each row: dashes for the pruned model, different ones for rows of one scope."""
    styles = {scope: cycle(STYLES) for scope in LOOKS}
    return [next(styles[curve.scope]) if curve.scope in LOOKS else (0, (5, 3)) for curve in rows]


def _is_drawn(error: Estimate | None) -> bool:
    return error is not None and error.mean > 0


def _scale(axes: Axes, rows: list[Curve]) -> None:
    """Blocks along the logarithmic axis of errors, in percent; no range of errors is shown as less than a factor."""
    drawn = [error for curve in rows for error in curve.hidden if error is not None and error.mean > 0]
    low, high = min(error.mean for error in drawn), max(error.mean + (error.std or 0.0) for error in drawn)
    grow = max((high / low) ** 0.06, math.sqrt(max(1.0, LEAST_RATIO * low / high)))
    low, high = 100 * low / grow, 100 * high * grow
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,), numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value >= 1e-6 else f"{value:g}"))
    depth = max(len(curve.hidden) for curve in rows)
    room = 0.03 * max(depth - 1, 1)
    axes.set_xlim(-room, depth - 1 + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=MOST_MARKERS, integer=True, min_n_ticks=1))


def _draw(axes: Axes, curve: Curve, style: object, marker: str) -> None:
    look = _look(curve)
    blocks = [depth for depth, error in enumerate(curve.hidden) if _is_drawn(error)]
    errors = [curve.hidden[depth] for depth in blocks]
    means = np.array([100 * error.mean for error in errors if error is not None])
    stds = np.array([100 * (error.std or 0.0) for error in errors if error is not None])
    axes.plot(
        blocks,
        means,
        color=look.color,
        linestyle=style,  # pyright: ignore[reportArgumentType]
        linewidth=1.4,
        marker=marker,
        markersize=0.8 * look.size,
        markevery=math.ceil(len(curve.hidden) / MOST_MARKERS),
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
        label=curve.label,
    )
    if stds.any():
        lower = np.maximum(means - stds, axes.get_ylim()[0])
        axes.fill_between(blocks, lower, means + stds, color=look.color, alpha=0.18, linewidth=0, zorder=2)
