"""The Pareto picture of one group: perplexity against peak memory, and against recovery time."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from recon.report.estimates import Estimate
from recon.report.front import memory_axis, pareto_front
from recon.report.groups import Group
from recon.report.looks import DARK, GREY, LOOKS
from recon.report.plots.style import PNG_DPI, WIDTH, frame, height_of, legend, markers_of
from recon.report.sections import format_number

LOG_RATIO = {"x": 20.0, "y": 5.0}
"""An axis is logarithmic if its largest value exceeds its smallest by this factor."""

LINEAR_STEPS = (1, 2, 2.5, 5, 10)

OFF_SCALE = 3.0
"""A pruned model farther above all else than this many of their spans is named, not drawn to scale."""


@dataclass(frozen=True)
class Point:
    """One row in one panel: what it costs and what perplexity that buys."""

    scope: str
    label: str
    cost: Estimate
    perplexity: Estimate


@dataclass(frozen=True)
class Reference:
    """A horizontal line at the perplexity of the dense or of the pruned model."""

    name: str
    perplexity: float

    @property
    def text(self) -> str:
        """What is written at the line."""
        return f"{self.name} {format_number(self.perplexity, 2)}"


@dataclass(frozen=True)
class Panel:
    """One of the two plots."""

    title: str
    points: list[Point]


def draw_group(group: Group) -> Figure | None:
    """Draw the picture of one group; None if no recovery of it was measured."""
    panels = list(_panels(group))
    if not any(panel.points for panel in panels):
        return None
    references = _references(group)
    height = height_of(len({point.label for panel in panels for point in panel.points}) + len(references))
    figure = Figure(figsize=(WIDTH, height), dpi=PNG_DPI)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    frame(figure, group, group.split, _notes(group, panels), height)
    drawn = [reference for reference in references if not _is_off_scale(reference, panels)]
    perplexities = [bound for panel in panels for point in panel.points for bound in _bounds(point.perplexity)]
    _scale(left, "y", perplexities + [reference.perplexity for reference in drawn], margin=0.12)
    markers = markers_of(group.rows)
    for axes, panel in zip((left, right), panels, strict=True):
        _scale(axes, "x", [bound for point in panel.points for bound in _bounds(point.cost)], margin=0.15)
        axes.set_xlabel(panel.title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#ececec", linewidth=0.6)
        axes.set_axisbelow(True)
        _draw_panel(axes, panel, references, drawn, markers)
    left.set_ylabel(f"{group.split} perplexity (lower is better)")
    legend(figure, [left, right])
    return figure


def _panels(group: Group) -> tuple[Panel, Panel]:
    memory, name = memory_axis(group)
    return (
        Panel(f"{name} (MiB)", _points(group, memory, scale=2**-20)),
        Panel("recovery time (seconds)", _points(group, "seconds")),
    )


def _points(group: Group, quantity: str, scale: float = 1.0) -> list[Point]:
    points = []
    for row in group.rows:
        perplexity, cost = row.estimate("perplexity"), row.estimate(quantity)
        if row.scope in LOOKS and perplexity is not None and cost is not None:
            std = None if cost.std is None else cost.std * scale
            points.append(Point(row.scope, row.label, Estimate(cost.mean * scale, std), perplexity))
    return sorted(points, key=lambda point: list(LOOKS).index(point.scope))


def _references(group: Group) -> list[Reference]:
    """Dense and pruned, measured by a cell of their own or carried along by the others."""
    references = []
    for name in ("dense", "pruned"):
        own = next((row.estimate("perplexity") for row in group.rows if row.scope == name), None)
        carried = [getattr(cell, f"{name}_perplexity") for cell in group.cells]
        carried = [value for value in carried if value is not None]
        if own is not None:
            references.append(Reference(name, own.mean))
        elif carried:
            references.append(Reference(name, sum(carried) / len(carried)))
    return references


def _notes(group: Group, panels: list[Panel]) -> list[str]:
    has_front = any(len(_front(panel)) > 1 for panel in panels)
    notes = ["Grey steps: nothing measured is both cheaper and better"] if has_front else []
    notes += [f"Left out: {failure}" for failure in group.failures]
    memory, seconds = ([point.label for point in panel.points] for panel in panels)
    if absent := [label for label in seconds if label not in memory]:
        notes.append(f"Without a measured {panels[0].title.removesuffix(' (MiB)')}: {', '.join(absent)}")
    return notes + group.remarks


def _draw_panel(
    axes: Axes, panel: Panel, references: list[Reference], drawn: list[Reference], markers: dict[str, str]
) -> None:
    for reference in references:
        style = "-" if reference.name == "dense" else (0, (5, 3))
        look = {"color": DARK, "linewidth": 0.9, "linestyle": style, "zorder": 1.5}
        if reference in drawn:
            axes.axhline(reference.perplexity, label=reference.text, **look)
        else:
            axes.plot([], [], label=f"{reference.text}, off scale ↑", **look)
    if len(front := _front(panel)) > 1:
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=0.9, drawstyle="steps-post", zorder=2)
    for point in panel.points:
        look = LOOKS[point.scope]
        axes.errorbar(
            point.cost.mean,
            point.perplexity.mean,
            xerr=point.cost.std,
            yerr=point.perplexity.std,
            color=look.color,
            marker=markers[point.label],
            markersize=look.size,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.0,
            capsize=2.0,
            zorder=3,
            linestyle="none",
            label=point.label,
        )


def _front(panel: Panel) -> list[tuple[float, float]]:
    return pareto_front([(point.cost.mean, point.perplexity.mean) for point in panel.points])


def _bounds(value: Estimate) -> tuple[float, float]:
    spread = value.std or 0.0
    return value.mean - spread, value.mean + spread


def _is_off_scale(reference: Reference, panels: list[Panel]) -> bool:
    """Whether drawing the pruned model's line would squash all that the picture is about."""
    if reference.name != "pruned":
        return False
    shown = [bound for panel in panels for point in panel.points for bound in _bounds(point.perplexity)]
    return reference.perplexity - max(shown) > OFF_SCALE * max(max(shown) - min(shown), 0.05 * min(shown))


def _scale(axes: Axes, which: str, values: list[float], margin: float) -> None:
    """Limits of the axis `which`, "x" or "y", with room for labels; logarithmic beyond `LOG_RATIO`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high > LOG_RATIO[which] * low:
        grow = (high / low) ** margin
        axes.set(**{f"{which}scale": "log", f"{which}lim": (low / grow, high * grow)})
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,), numticks=8))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        return
    room = margin * (high - low) or 0.06 * abs(high) or 1.0
    start = low - room
    if low >= 0:  # neither costs nor perplexities are negative, so no tick should be
        start = max(start, min(0.0, low - room / 4))
    axes.set(**{f"{which}lim": (start, high + room)})
    axis.set_major_locator(MaxNLocator(nbins=6, steps=LINEAR_STEPS))
    plain_numbers = ScalarFormatter(useOffset=False)
    plain_numbers.set_scientific(False)
    axis.set_major_formatter(plain_numbers)
