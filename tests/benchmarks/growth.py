"""Seconds and peak bytes of every scope against depth, width and tokens, on random Llamas.

The local scopes run with model and activations on the host, so that the device's side holds one window; full
retraining has everything on the device.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fits import Data, Fit, fit, of_the_fit, peak_bytes, say

SCOPES = ("matrix", "submodule", "block", "full")
OFFLOADED = ("--model.offload", "host", "--model.activations", "host")


@dataclass(frozen=True)
class Point(Data):
    """One model and how much it is recovered on.

    Args:
        depth: Blocks.
        width: Hidden size; the MLP is three times as wide, heads have 32 dimensions.
    """

    num_sequences: int = 32
    num_validation: int = 4
    depth: int = 6
    width: int = 128

    @property
    def copy_bytes(self) -> int:
        """One copy of the hidden states of all sequences, in fp32."""
        return 4 * (self.num_sequences + self.num_validation) * self.seq_len * self.width

    def options(self, scope: str) -> list[str]:
        """Options of `recon fit`."""
        shape = {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.width // 32,
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": True,
        }
        batch = "--data.batch_size" if scope == "full" else "--model.batch_size"
        return [
            *("--model.name", "random", f"--model.shape={json.dumps(shape)}", "-c", "criteria/magnitude"),
            *(*self.data_options, batch, "4", "--trainer.accelerator", "cpu"),
            *([] if scope == "matrix" else ["--model.epochs", "1", "--model.lr", "1e-3"]),
            *([] if scope == "full" else OFFLOADED),
        ]


def points(axis: str, quick: bool) -> dict[int, Point]:
    """Value on the axis -> point."""
    if quick:
        depth, width, num = (1, 2), (32, 64), (8, 16)  # two steps an epoch: the second has optimizer state
        small = {"num_sequences": 8, "seq_len": 16, "width": 32, "depth": 1}
    else:
        depth, width, num = (6, 12, 24, 48), (64, 128, 256), (16, 32, 64, 128)
        small = {}
    if axis == "depth":
        return {one: Point(**small | {"depth": one}) for one in depth}
    if axis == "width":
        return {one: Point(**small | {"width": one}) for one in width}
    found = [Point(**small | {"num_sequences": one}) for one in num]
    return {point.num_sequences * point.seq_len: point for point in found}


def measure(axis: str, directory: Path, quick: bool = False, scopes: tuple[str, ...] = SCOPES) -> dict[str, Any]:
    """A row per scope and value on the axis, and how straight a line the seconds make.

    Args:
        axis: depth, width or tokens.
        directory: Where the runs go.
        quick: Tiny models.
        scopes: Which.
    """
    # The first fit in a process pays for imports and for what libraries set up.
    fit("matrix", directory / "first", *Point(depth=1, width=32, num_sequences=4, seq_len=16).options("matrix"))
    rows, lines = [], {}
    for scope in scopes:
        found = []
        for value, point in points(axis, quick).items():
            run = fit(scope, directory / f"{scope}-{value}", *point.options(scope))
            found.append({"scope": scope, axis: value, **_measured(run), "copies": _copies(run, point)})
            say(f"{axis}: {scope}, {value}: {run.seconds:.2f} s")
        for row in found:
            row["times"] = {name: _ratio(row[name], found[0][name]) for name in _measured_names(found[0], axis)}
        rows += found
        if axis != "width":
            lines[scope] = straight_line([row[axis] for row in found], [row["seconds"] for row in found])
    return {"axis": axis, "rows": rows, "lines": lines}


def _measured(run: Fit) -> dict[str, Any]:
    return {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, **peak_bytes(run)}


def _copies(run: Fit, point: Point) -> float:
    """Hidden states on the host at their most, in copies of those of all sequences."""
    return max(phase["categories"]["host"]["calibration"] for phase in of_the_fit(run.memory)) / point.copy_bytes


def _measured_names(row: dict[str, Any], axis: str) -> list[str]:
    return [name for name in row if name not in ("scope", axis, "copies", "times")]


def _ratio(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None


def straight_line(values: list[float], seconds: list[float]) -> dict[str, float]:
    """The line constant + slope * value with the least relative errors, and what it leaves.

    Returns:
        `constant`, `slope`, and `deviation`, the largest |(seconds - constant) / (slope * value) - 1|: how far what
        grows is from growing in proportion.
    """
    # min over (a, b) of sum_i ((a + b x_i) / s_i - 1)^2
    ones, xs = [1 / s for s in seconds], [x / s for x, s in zip(values, seconds, strict=True)]
    aa, ab, bb = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((ones, ones), (ones, xs), (xs, xs)))
    a1, b1 = sum(ones), sum(xs)
    determinant = aa * bb - ab * ab
    constant, slope = (a1 * bb - b1 * ab) / determinant, (aa * b1 - ab * a1) / determinant
    deviation = max(abs((s - constant) / (slope * x) - 1) for x, s in zip(values, seconds, strict=True))
    return {"constant": constant, "slope": slope, "deviation": deviation}


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per scope and value, then one per line that was fitted."""
    axis = result["axis"]
    lines = [
        f"| scope | {axis} | seconds | times the first | device side, MiB | times the first | host side, MiB | "
        "times the first | hidden states on the host, copies |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = [f"{row['seconds']:.2f}", _times(row, "seconds")]
        for name in ("device_bytes", "host_bytes"):
            cells += ["" if row[name] is None else f"{row[name] / 2**20:.2f}", _times(row, name)]
        lines.append(f"| {row['scope']} | {row[axis]} | {' | '.join(cells)} | {row['copies']:.2f} |")
    if result["lines"]:
        lines += ["", f"| seconds = constant + slope x {axis} | constant | slope | largest deviation from it |"]
        lines += ["|---|--:|--:|--:|"]
        for scope, line in result["lines"].items():
            lines.append(f"| {scope} | {line['constant']:.2f} | {line['slope']:.3g} | {line['deviation']:.1%} |")
    return "\n".join(lines)


def _times(row: dict[str, Any], name: str) -> str:
    return "" if row["times"][name] is None else f"{row['times'][name]:.2f}"
