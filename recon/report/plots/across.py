"""The picture of several groups: loss above the dense model's along the axis with the most places.

A panel for each line of groups that differ along this axis alone, a curve for each row.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from recon.report.across import Line, differing, lines_along
from recon.report.estimates import Estimate, estimate
from recon.report.groups import Group, Row
from recon.report.looks import LOOKS, REFERENCE
from recon.report.plots.style import PNG_DPI, WIDTH, framed, height_of, legend, markers_of, said_of_seeds

MOST_PANELS = 6

ROOM = 96
"""Characters of the places below all panels of a line; where they are more, they are turned."""


def draw_across(groups: Sequence[Group]) -> Figure | None:
    """The picture of some groups; None for fewer than two places, more panels than fit, or without a dense model."""
    axes_of = differing(groups)
    lines = lines_along(axes_of[0], groups) if axes_of else []
    if not 0 < len(lines) <= MOST_PANELS:
        return None
    places = list(dict.fromkeys(getattr(group, axes_of[0]) for group in groups))
    rows = list({row.label: row for group in groups for row in group.rows if row.scope != "dense"}.values())
    if not any(above_dense(row, group) for group in groups for row in group.rows):
        return None
    num_across = min(len(lines), 2)
    num_down = math.ceil(len(lines) / num_across)
    height = max(height_of(len(rows)), 1.2 + 2.9 * num_down)
    figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
    FigureCanvasAgg(figure)
    turned = sum(len(place) + 2 for place in places) > ROOM // num_across
    framed(figure, *_facts(groups, axes_of), [_NOTE], height)
    panels = figure.subplots(num_down, num_across, sharex=True, sharey=True, squeeze=False).flatten()
    named, turning = 0.25 / height if len(lines) > 1 else 0, 0.5 / height if turned else 0
    figure.subplots_adjust(
        hspace=0.15, top=figure.subplotpars.top - named, bottom=figure.subplotpars.bottom + turning - 0.15 / height
    )
    markers = markers_of(rows)
    for panel in panels[len(lines) :]:
        panel.set_visible(False)
    for panel, line in zip(panels, lines, strict=False):
        _draw(panel, line, places, rows, markers, turned)
    for lowest in panels[len(lines) - num_across : len(lines)]:
        lowest.tick_params(labelbottom=True)
    for first in panels[::num_across]:
        first.set_ylabel("nats per token above the dense model")
    _scale(panels[0])
    legend(figure, list(panels[: len(lines)]), {row.label: "" for row in rows})
    return figure


_NOTE = (
    "Loss on the named split minus that of the dense model, log(perplexity / dense perplexity); lower is better. "
    "Places stand in the order of the comparison, at equal distances"
)


def above_dense(row: Row, group: Group) -> Estimate | None:
    """Loss of a row above that of its group's dense model, in nats per token; None if one of them is unknown, or 0."""
    dense = next((one.estimate("perplexity") for one in group.rows if one.scope == "dense"), None)
    if dense is None or row.scope == "dense":
        return None
    losses = [math.log(cell.perplexity / dense.mean) for cell in row.measured if cell.perplexity is not None]
    return found if (found := estimate(losses)) is not None and found.mean > 0 else None


def _facts(groups: Sequence[Group], axes_of: Sequence[str]) -> tuple[str, str]:
    """Title and line below: what all groups have in common, and what differs."""
    first = groups[0]
    same = {name: getattr(first, name) for name in ("model", "text", "criterion", "pattern") if name not in axes_of}
    title = same.pop("model", "") or f"{len({group.model for group in groups})} models"
    told = [f"{name} {value}" for name, value in same.items() if value not in ("", "none")]
    splits = "/".join(dict.fromkeys(group.split for group in groups))
    seeds = sorted({seed for group in groups for seed in group.seeds})
    return title, ", ".join([*told, f"{splits} split", said_of_seeds(seeds)])


def _draw(
    axes: Axes, line: Line, places: Sequence[str], rows: Sequence[Row], markers: dict[str, str], turned: bool
) -> None:
    axes.set_title(line.name, fontsize=9.5)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), places, rotation=30 if turned else 0, ha="right" if turned else "center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    for row in rows:
        found = [(number, _of(row.label, line.groups.get(place))) for number, place in enumerate(places)]
        drawn = [(number, value) for number, value in found if value is not None]
        has_spread = any(value.std for _, value in drawn)
        look = LOOKS.get(row.scope, REFERENCE)
        axes.errorbar(
            [number for number, _ in drawn],
            [value.mean for _, value in drawn],
            yerr=[min(value.std or 0.0, 0.99 * value.mean) for _, value in drawn] if has_spread else None,
            color=look.color,
            linestyle="-" if row.scope in LOOKS else (0, (5, 3)),
            linewidth=1.2,
            marker=markers[row.label] or "x",
            markersize=0.8 * look.size,
            markeredgecolor="white" if markers[row.label] else look.color,
            markeredgewidth=0.6 if markers[row.label] else 1.0,
            elinewidth=0.9,
            capsize=1.5,
            zorder=3,
            label=row.label,
        )


def _of(label: str, group: Group | None) -> Estimate | None:
    row = next((one for one in group.rows if one.label == label), None) if group is not None else None
    return above_dense(row, group) if row is not None and group is not None else None


def _scale(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,), numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value >= 1e-6 else f"{value:g}"))
