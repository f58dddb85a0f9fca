"""The acceptance table as markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30


def tables(record: Mapping[str, Any]) -> str:
    """Render the machine, the rows and their kernels.

    Args:
        record: The content of gpu.json.
    """
    found = record["rows"]
    measured = [row for row in found if row["kind"] != "rates"]
    parts = [_machine(record), _rows(measured), _kernels(measured), _reasons(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(record: Mapping[str, Any]) -> str:
    lines = [f"`{record['command']}`: {record['seconds']:.0f} s, {record['verdict']}."]
    if machine := record["environment"]:
        libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning"))
        lines.append(f"{machine['device']}, {libraries}, Python {machine['python']}, {machine['date']}.")
    if rates := record["rates"]:
        shown = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in rates.items())
        lines.append(f"Products of large square matrices, TFLOP/s: {shown}.")
    return "\n".join(lines)


def _rows(found: Sequence[Mapping[str, Any]]) -> str:
    header = [
        *("row", "outcome", "fit, s", "windows", "allocated, GiB", "tracked, GiB", "tracked / allocated"),
        *("planned / allocated", "PFLOP", "share of bf16 products", "device busy"),
    ]
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'--:|' * (len(header) - 2)}"]
    for row in found:
        allocated, tracked, planned = (row.get(f"{name}_bytes") for name in ("allocated", "tracked", "planned"))
        profile = row.get("profile") or {}
        cells = [
            row["name"],
            row["outcome"],
            _number(row.get("seconds"), 1),
            f"{row.get('windows_done', 0)}/{row['num_windows']}" if row.get("num_windows") else "",
            _number(allocated, 2, GIB),
            _number(tracked, 2, GIB),
            _ratio(tracked, allocated),
            _ratio(planned, allocated),
            _number(row.get("flops"), 2, 1e15),
            "" if row.get("share") is None else f"{row['share']:.1%}",
            f"{profile['busy_seconds'] / profile['seconds']:.0%}" if "kernels" in profile else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _kernels(found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| row | largest kernels | share of the device's time | ms | calls |", "|---|---|--:|--:|--:|"]
    for row in found:
        for kernel in (row.get("profile") or {}).get("kernels", ()):
            name = kernel["name"].replace("|", "/")[:90]
            numbers = f"{kernel['share']:.1%} | {kernel['milliseconds']:.1f} | {kernel['calls']}"
            lines.append(f"| {row['name']} | `{name}` | {numbers} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _reasons(found: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- {row['name']}: {row['reason']}" for row in found if row.get("reason"))


def _number(value: float | None, decimals: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{decimals}f}"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.3f}" if one and other else ""
