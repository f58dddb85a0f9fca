"""Charts of single runs: windows, memory, loss, tuned options, density; each row is shown by its first seed."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from recon.profiling.entries import CATEGORIES, Side
from recon.report.groups import Group, Row
from recon.report.looks import CATEGORY_COLORS, CATEGORY_NAMES
from recon.report.memory_phases import MIB, Phase, describe, fold_windows, tracked
from recon.report.page.chart import Chart, axis, look_of, styled, y_of
from recon.report.page.curves import Curve
from recon.report.schema import Report

BAR, FRAME = 26, 170
"""Pixels of a bar, and of what stands around bars."""

MOST_TEXTS = 16
"""Blocks up to which their densities are written in the chart."""

BARS = {
    "barmode": "stack",
    "xaxis": axis("MiB"),
    "yaxis": axis("", type="category"),
    "legend": {"traceorder": "normal"},
}


def window_charts(group: Group) -> list[Chart]:
    """Held-out error of each window before and after its recovery; none if there are no windows."""
    data = []
    for row, cell in _firsts(group):
        if not cell.windows:
            continue
        symbol, dash = styled(group, row)
        color = look_of(row).color
        shared = {"type": "scatter", "mode": "lines+markers", "legendgroup": row.label, "x": list(cell.windows)}
        for key, opens in (("before", True), ("after", False)):
            data.append(
                {
                    **shared,
                    "name": f"{row.label}, {key}",
                    "y": [errors.get(key) for errors in cell.windows.values()],
                    "line": {"color": color, "dash": "dot" if opens else dash, "width": 1 if opens else 1.5},
                    "marker": {"color": color, "symbol": f"{symbol}-open" if opens else symbol, "size": 7},
                    "hovertemplate": f"{row.label}, window %{{x}}, {key}: %{{y:.4g}}<extra></extra>",
                }
            )
    if not data:
        return []
    layout = {
        "xaxis": axis("window", type="category", categoryorder="category ascending"),
        "yaxis": axis("held-out error", log=y_of(data)),
    }
    caption = (
        "Error on the validation sequences relative to the dense output, open markers before recovery. Inputs differ "
        "between scopes. From windows of each report, first seed"
    )
    return [Chart("Error of each window before and after", data, layout, caption, is_wide=True)]


def peak_charts(group: Group) -> list[Chart]:
    """The categories of live tensors at the peak of recovery, a bar for each row; none if they were not tracked."""
    charts = []
    sides: tuple[tuple[Side, str], ...] = (("device", "on the device"), ("host", "on the host"))
    for side, name in sides:
        found = [(row.label, largest) for row, cell in _firsts(group) if (largest := _largest(cell, side))]
        if not found:
            continue
        bars = dict(reversed(found))
        caption = (
            f"Live tensors {name} when they were most during recovery, of the process that had most; without an "
            "accelerator, tensors that would be there. From ranks.tracked of each report, first seed"
        )
        height = FRAME + BAR * len(bars)
        charts.append(Chart(f"Memory {name} by category", _stacked(bars), BARS, caption, height))
    return charts


def phase_chart(phases: Iterable[Phase], side: Side, device: str, file: str) -> Chart | None:
    """The categories of one run, a bar for each phase; None if nothing was tracked on this side."""
    shown = [phase for phase in fold_windows(list(phases), 12, lambda one: tracked(one, side)) if tracked(phase, side)]
    if not shown:
        return None
    bars = {str(phase["phase"]): phase["categories"][side] for phase in reversed(shown)}
    title = f"Live tensors {describe(side, device)}"
    return Chart(title, _stacked(bars), BARS, f"At the peak of each phase. From {file}", FRAME + BAR * len(bars))


def tuning_charts(group: Group) -> list[Chart]:
    """Validation perplexity against the one number that was tuned, and held-out error against the rates tried."""
    tuned, tried = [], []
    for row, cell in _firsts(group):
        look = {"color": look_of(row).color, "symbol": styled(group, row)[0]}
        if line := _tuned(cell):
            tuned.append(_curve(row.label, line, look))
        for kind, rate in cell.rates.items():
            points = sorted((one["lr"], one["error"]) for one in rate["tried"] if one["error"] is not None)
            tried.append(_curve(f"{row.label}, {kind}", points, look))
    charts = []
    if tuned:
        layout = {"xaxis": axis("value", log=_x_of(tuned)), "yaxis": axis("validation perplexity")}
        caption = "Each option that was tuned alone; the table below has all. From tuning of each report"
        charts.append(Chart("Tuned options", tuned, layout, caption))
    if tried:
        layout = {"xaxis": axis("learning rate", log=_x_of(tried)), "yaxis": axis("held-out error", log=y_of(tried))}
        caption = "Short trials by which model.lr: auto has chosen. From rates of each report, first seed"
        charts.append(Chart("Learning rates tried", tried, layout, caption))
    return charts


def loss_charts(group: Group, logged: Mapping[str, Mapping[str, Curve]]) -> list[Chart]:
    """Logged losses against the optimizer step: errors of windows and losses of whole models, each in a chart.

    Args:
        group: The rows.
        logged: Label of a row -> name of a curve -> the curve.
    """
    charts = []
    for held_out, title, what in (
        ("held_out_error", "Training of windows", "relative squared error"),
        ("held_out_loss", "Training of the whole model", "loss in nats per token"),
    ):
        data = []
        for row, _ in _firsts(group):
            curves = logged.get(row.label, {})
            if held_out not in curves:
                continue
            for name in ("loss", held_out):
                if name in curves:
                    data.append(_logged(row, name, curves[name], styled(group, row)))
        if data:
            of_windows = held_out == "held_out_error"
            values = axis(what, log=y_of(data) if of_windows else ())
            layout = {"xaxis": axis("optimizer step"), "yaxis": values}
            caption = f"Dots: {held_out}, on the validation split. From logs/ of each run, first seed"
            charts.append(Chart(title, data, layout, caption))
    return charts


def density_charts(group: Group) -> list[Chart]:
    """The share of weights that is kept, a row for each kind of matrix and a column for each block."""
    cell = next((cell for cell in group.cells if cell.densities), None)
    if cell is None:
        return []
    shares: dict[str, dict[str, float]] = {}
    for name, density in cell.densities.items():
        block, kind = _place(name)
        shares.setdefault(kind, {})[block] = 100 * density
    blocks = sorted({block for row in shares.values() for block in row}, key=lambda one: (len(one), one))
    kinds = list(shares)[::-1]
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": blocks,
            "y": kinds,
            "z": [[shares[kind].get(block) for block in blocks] for kind in kinds],
            "colorscale": "Viridis",
            "zmin": 0,
            "zmax": 100,
            "colorbar": {"title": {"text": "kept (%)"}, "thickness": 12},
            "texttemplate": "%{z:.0f}" if len(blocks) <= MOST_TEXTS else "",
            "hovertemplate": "block %{x}, %{y}: %{z:.2f} % kept<extra></extra>",
        }
    ]
    layout = {"xaxis": axis("block", type="category"), "yaxis": axis("", type="category")}
    caption = f"Share of weights that is kept. From densities of {cell.run_dir or cell.label}, seed {cell.seed}"
    return [Chart("Density of each matrix", data, layout, caption, FRAME + BAR * len(kinds))]


def _firsts(group: Group) -> list[tuple[Row, Report]]:
    return [(row, row.measured[0]) for row in group.rows if row.measured]


def _largest(cell: Report, side: Side) -> Mapping[str, int]:
    found = [sizes for rank in cell.ranks if (sizes := rank.get("tracked", {}).get(side))]
    return max(found, key=lambda sizes: sum(sizes.values()), default={})


def _stacked(bars: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """A trace for each category that is not empty; `bars` are from bottom to top."""
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": CATEGORY_NAMES[name],
            "y": list(bars),
            "x": [sizes.get(name, 0) / MIB for sizes in bars.values()],
            "marker": {"color": CATEGORY_COLORS[name]},
            "hovertemplate": f"%{{y}}, {CATEGORY_NAMES[name]}: %{{x:.2f}} MiB<extra></extra>",
        }
        for name in CATEGORIES
        if any(sizes.get(name) for sizes in bars.values())
    ]


def _tuned(cell: Report) -> list[tuple[float, float]]:
    """Value and perplexity of each point, if one number alone was tuned."""
    if not cell.tuning or any(len(point["options"]) != 1 for point in cell.tuning):
        return []
    points = [(next(iter(point["options"].values())), point["perplexity"]) for point in cell.tuning]
    if not all(type(value) in (int, float) and value > 0 for value, _ in points):
        return []
    return sorted((value, perplexity) for value, perplexity in points if perplexity is not None)


def _curve(name: str, points: Iterable[tuple[float, float]], look: Mapping[str, str]) -> dict[str, Any]:
    points = list(points)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": look["color"], "width": 1.5},
        "marker": {**look, "size": 7},
        "hovertemplate": f"{name}: %{{y:.4g}} at %{{x:.3g}}<extra></extra>",
    }


def _logged(row: Row, name: str, curve: Curve, style: tuple[str, str]) -> dict[str, Any]:
    symbol, dash = style
    is_held_out = name != "loss"
    return {
        "type": "scatter",
        "mode": "markers" if is_held_out else "lines",
        "name": f"{row.label}, {'held out' if is_held_out else 'training'}",
        "legendgroup": row.label,
        "x": curve.steps,
        "y": curve.values,
        "line": {"color": look_of(row).color, "width": 1, "dash": dash},
        "marker": {"color": look_of(row).color, "symbol": symbol, "size": 6},
        "hovertemplate": f"{row.label}, {name} at step %{{x}}: %{{y:.4g}}<extra></extra>",
    }


def _x_of(data: Iterable[dict[str, Any]]) -> list[float]:
    return [value for trace in data for value in trace["x"]]


def _place(name: str) -> tuple[str, str]:
    """The block of a matrix, and its name within."""
    found = re.search(r"\.(\d+)\.(.+?)(\.weight)?$", name)
    return (found[1], found[2]) if found else ("-", name.removesuffix(".weight"))
