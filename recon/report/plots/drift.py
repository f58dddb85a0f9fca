"""The picture of drift: error of the hidden state against depth, a line for each row of one group.

Drawn as the Pareto picture is: by matplotlib's object-oriented interface, with the same colours and markers. Lines
are named at their right end, where they are often close together: names are moved apart and tied to their ends.
"""

import math
import textwrap
from itertools import cycle

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy import ndarray

from recon.report.drift import Curve, curves, protocol, split
from recon.report.estimates import Estimate
from recon.report.groups import Group
from recon.report.plots.style import DARK, LOOKS, PNG_DPI, WIDTH, Look, frame
from recon.report.sections import show

HEIGHT, MOST_NAMES = 4.8, 22
"""Inches of a picture, and names that find room in them; more make it higher."""

NAME_GAP = 13.0
"""Least points between the names of two lines."""

MOST_MARKERS = 13
"""Of a line; a deeper model has one at every second, third, ... block."""

LEAST_RATIO = 4.0
"""Of the largest to the smallest error that the axis shows: noise should not fill the picture."""

REFERENCE = Look(DARK, DARK, "", 0.0)
"""Of the pruned model, dashed as in the Pareto picture."""

LONGEST_NAME = 60
"""Characters of a label; the table has all of it."""

STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
"""Rows of one scope share its colour and marker; their lines differ."""


def draw_depth(group: Group) -> Figure | None:
    """The picture of one group; None if no drift was measured, or no row differs from the dense model."""
    rows = [curve for curve in curves(group) if any(_is_drawn(error) for error in curve.hidden)]
    if not rows:
        return None
    rows.sort(key=lambda curve: ["dense", "pruned", *LOOKS].index(curve.scope))  # smaller markers lie on top
    height = HEIGHT + max(0, len(rows) - MOST_NAMES) * NAME_GAP / 72
    figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
    canvas = FigureCanvasAgg(figure)
    frame(figure, group, split(group), _notes(group, rows), height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("after block")
    axes.set_ylabel("relative squared error of the hidden state (%)")
    _scale(axes, rows)
    for curve, look, style in zip(rows, map(_look, rows), _styles(rows), strict=True):
        _draw(axes, curve, look, style)
    _name(figure, axes, rows, canvas)
    return figure


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


def _draw(axes: Axes, curve: Curve, look: Look, style: object) -> None:
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
        marker=look.marker,
        markersize=0.8 * look.size,
        markevery=math.ceil(len(curve.hidden) / MOST_MARKERS),
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )
    if stds.any():
        lower = np.maximum(means - stds, axes.get_ylim()[0])
        axes.fill_between(blocks, lower, means + stds, color=look.color, alpha=0.18, linewidth=0, zorder=2)


def _name(figure: Figure, axes: Axes, rows: list[Curve], canvas: FigureCanvasAgg) -> None:
    """Write each row's label and KL to the right of its line, in the order of the ends, a leader line between."""
    named = []
    for curve in rows:
        label = textwrap.shorten(curve.label, LONGEST_NAME)
        text = f"{label}  KL {show(curve.kl, decimals=3, spread=True)}"
        named.append(axes.text(0, 0, text, color=_look(curve).ink, va="center"))
    pixels = figure.dpi / 72  # per point
    room = max(Text.get_window_extent(text, canvas.get_renderer()).width for text in named) + 34 * pixels
    figure.subplots_adjust(right=1 - room / figure.bbox.width)

    ends = [max(depth for depth, error in enumerate(curve.hidden) if _is_drawn(error)) for curve in rows]
    points = axes.transData.transform(
        [(end, 100 * curve.hidden[end].mean) for end, curve in zip(ends, rows, strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
    )
    bottom, top = axes.bbox.y0, axes.bbox.y1
    heights = spread_out(points[:, 1], NAME_GAP * pixels, bottom, top)
    for text, curve, point, height in zip(named, rows, points, heights, strict=True):
        corners = [(point[0] + 6 * pixels, point[1]), (axes.bbox.x1 + 8 * pixels, point[1])]
        corners += [(axes.bbox.x1 + 22 * pixels, height), (axes.bbox.x1 + 26 * pixels, height)]
        corners.append((axes.bbox.x1 + 29 * pixels, height))
        *path, position = axes.transData.inverted().transform(corners)
        axes.plot(*np.transpose(path), color=_look(curve).color, linewidth=0.6, clip_on=False, gid="leader", zorder=2.5)
        text.set_position((position[0], position[1]))


def spread_out(wanted: Float[ndarray, " n"], gap: float, low: float, high: float) -> Float[ndarray, " n"]:
    """Positions from `low` to `high`, at least `gap` apart and in the order wanted, nearest to those in squares.

    With position i moved by i gaps, "at least a gap apart" reads "not falling": an isotonic regression, by pooling
    neighbours that fall (Barlow et al., 1972). Where `low` to `high` is too short for all, it is overrun at `low`.
    """
    order = np.argsort(wanted, kind="stable")
    pools: list[tuple[float, int]] = []  # mean and number of neighbours
    for value in wanted[order] - gap * np.arange(len(wanted)):
        mean, number = float(value), 1
        while pools and pools[-1][0] >= mean:
            before, more = pools.pop()
            mean, number = (mean * number + before * more) / (number + more), number + more
        pools.append((mean, number))
    fitted = np.concatenate([np.full(number, mean) for mean, number in pools])
    placed = np.empty(len(wanted))
    placed[order] = np.minimum(np.maximum(fitted, low), high - gap * (len(wanted) - 1)) + gap * np.arange(len(wanted))
    return placed
