"""Charts of perplexity against memory and time, and of drift against depth."""

from collections.abc import Sequence
from typing import Any

from recon.report.drift import curves, protocol
from recon.report.front import memory_axis, pareto_front
from recon.report.groups import Group, Row
from recon.report.looks import GREY, LOOKS
from recon.report.page.chart import Chart, axis, look_of, styled, y_of
from recon.report.sampling import perplexity_error
from recon.report.sections import format_number, show

LOG_RATIO = 20.0
"""An axis of costs is logarithmic if its largest value exceeds its smallest by this factor."""


def pareto_charts(group: Group) -> list[Chart]:
    """Perplexity against memory and against time; none if no recovery was measured."""
    memory, name = memory_axis(group)
    drawn = [(memory, f"{name} (MiB)", 2**-20), ("seconds", "recovery time (seconds)", 1.0)]
    return [chart for one in drawn if (chart := _pareto(group, *one)) is not None]


def _pareto(group: Group, quantity: str, title: str, scale: float) -> Chart | None:
    data: list[dict[str, Any]] = []
    points = []
    for row in group.rows:
        cost, perplexity = row.estimate(quantity), row.estimate("perplexity")
        if row.scope not in LOOKS or cost is None or perplexity is None:
            continue
        points.append((cost.mean * scale, perplexity.mean))
        symbol, _ = styled(group, row)
        look = look_of(row)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": row.label,
                "x": [cost.mean * scale],
                "y": [perplexity.mean],
                "error_x": {"type": "data", "array": [(cost.std or 0) * scale], "thickness": 1, "width": 2},
                "error_y": {"type": "data", "array": [perplexity.std or 0], "thickness": 1, "width": 2},
                "marker": {"color": look.color, "symbol": symbol, "size": 1.5 * look.size},
                "hovertext": [_details(row)],
                "hovertemplate": "%{hovertext}<extra></extra>",
            }
        )
    if not points:
        return None
    front = pareto_front(points)
    steps = {"type": "scatter", "mode": "lines", "name": "front", "hoverinfo": "skip", "showlegend": False}
    line = {"color": GREY, "width": 1, "shape": "hv"}
    data.insert(0, {**steps, "x": [x for x, _ in front], "y": [y for _, y in front], "line": line})
    costs = [x for x, _ in points]
    log = min(costs) > 0 and max(costs) > LOG_RATIO * min(costs)
    lines, marks = _references(group, max(y for _, y in points))
    layout = {
        "xaxis": axis(title, log=costs) if log else axis(title, rangemode="tozero"),
        "yaxis": axis(f"{group.split} perplexity"),
        "shapes": lines,
        "annotations": marks,
    }
    caption = (
        "Lower left is better; grey: nothing measured is both cheaper and better. Bars: standard deviation over seeds. "
        f"From perplexity and {quantity} of each report"
    )
    return Chart(f"Perplexity against {title.partition(' (')[0]}", data, layout, caption)


def _references(group: Group, highest: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines at the dense and the pruned model, and their names; one far above all else is only named."""
    lines, marks = [], []
    for row in group.rows:
        value = row.estimate("perplexity")
        if row.scope not in ("dense", "pruned") or value is None:
            continue
        text = f"{row.label} {format_number(value.mean, 2)}"
        named = {"xref": "paper", "x": 1, "xanchor": "right", "showarrow": False, "font": {"size": 11}}
        if value.mean > 1.5 * highest:
            marks.append({**named, "text": f"{text}, off scale ↑", "yref": "paper", "y": 1, "yanchor": "top"})
            continue
        dash = "solid" if row.scope == "dense" else "dash"
        ends = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value.mean, "y1": value.mean}
        lines.append({**ends, "line": {"color": GREY, "width": 1, "dash": dash}})
        marks.append({**named, "text": text, "y": value.mean, "yanchor": "bottom"})
    return lines, marks


def _details(row: Row) -> str:
    """What the pointer tells of a row."""
    error = perplexity_error(row)
    lines = [
        f"<b>{row.label}</b>, {len(row.measured)} of {len(row.cells)} seeds",
        f"perplexity {show(row.estimate('perplexity'), decimals=2, spread=True)}"
        + (f", ± {format_number(error, 2)} by sampling" if error is not None else ""),
        f"recovered {show(row.estimate('recovered'), scale=100.0, spread=True)} %",
        f"device, live tensors {show(row.estimate('tracked_device_bytes'), scale=2**-20)} MiB",
        f"device, allocated {show(row.estimate('peak_device_bytes'), scale=2**-20)} MiB",
        f"host {show(row.estimate('peak_host_bytes'), scale=2**-20, decimals=0)} MiB",
        f"{show(row.estimate('seconds'))} s, {show(row.estimate('train_tokens'), decimals=0)} training tokens",
        *(f"{cell.run_dir}/report.json" for cell in row.measured if cell.run_dir),
    ]
    return "<br>".join(line for line in lines if " - MiB" not in line)


def drift_charts(group: Group) -> list[Chart]:
    """Error of the hidden state against depth; none if no drift was measured."""
    rows = {row.label: row for row in group.rows}
    data = []
    for curve in curves(group):
        depths = [depth for depth, error in enumerate(curve.hidden) if error is not None and error.mean > 0]
        errors = [error for error in curve.hidden if error is not None and error.mean > 0]
        if not errors:
            continue
        row = rows[curve.label]
        symbol, dash = styled(group, row)
        spread = {"type": "data", "array": [100 * (error.std or 0) for error in errors], "thickness": 1, "width": 2}
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{curve.label}, KL {show(curve.kl, decimals=3)}",
                "x": depths,
                "y": [100 * error.mean for error in errors],
                "error_y": spread,
                "line": {"color": _ink(row), "dash": dash if row.scope in LOOKS else "dash", "width": 1.5},
                "marker": {"color": _ink(row), "symbol": symbol, "size": 7},
                "hovertemplate": f"{curve.label}, after block %{{x}}: %{{y:.4g}} %<extra></extra>",
            }
        )
    if not data:
        return []
    layout = {
        "xaxis": axis("after block", dtick=_step(data)),
        "yaxis": axis("relative squared error (%)", log=y_of(data)),
    }
    caption = (
        "||h - h_dense||² / ||h_dense||² of what each block returns; KL(dense || row) in nats per token. "
        f"Measured on {protocol(group)}. From drift of each report"
    )
    return [Chart("Drift from the dense model over depth", data, layout, caption)]


def _ink(row: Row) -> str:
    return LOOKS[row.scope].color if row.scope in LOOKS else GREY


def _step(data: Sequence[dict[str, Any]]) -> int:
    return max(1, max(max(trace["x"]) for trace in data) // 12)
