"""What it costs to follow memory by category: fits with `MemoryProfiler` as it is and with `by_category: false`."""

from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from callbacks import MemoryProfiler

from .bare_loop import QUICK, Size
from .fits import fit, say

SCOPES = ("matrix", "submodule", "block", "full")
REPEATS = 3
GOAL = 1.05

_init = MemoryProfiler.__init__


def _blind(self: MemoryProfiler, print_table: bool = True, by_category: bool = True) -> None:
    _init(self, print_table, by_category=False)


def measure(directory: Path, quick: bool = False, scopes: tuple[str, ...] = SCOPES) -> dict[str, Any]:
    """Seconds of both in turn and the ratio of their medians, per scope."""
    size = QUICK if quick else Size()
    options = [*size.data_options, "--trainer.accelerator", "cpu"]
    masks = fit("matrix", directory / "masks", *options).directory / "masks.safetensors"
    rows = []
    for scope in scopes:
        row: dict[str, Any] = {"scope": scope, "with": [], "without": []}
        for repeat in range(1 if quick else REPEATS):
            for name, init in (("with", _init), ("without", _blind)):
                with mock.patch.object(MemoryProfiler, "__init__", init):
                    run = fit(scope, directory / f"{scope}-{name}-{repeat}", *options, "--masks", str(masks))
                assert bool(run.memory["phases"][0].get("categories")) == (name == "with")
                row[name].append(run.seconds)
            say(f"profiler: {scope}, {row['with'][-1]:.2f} s with, {row['without'][-1]:.2f} s without")
        row["ratio"] = median(row["with"]) / median(row["without"])
        rows.append(row)
    return {"goal": GOAL, "size": vars(size), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per scope."""
    lines = ["| scope | with categories, s | without, s | ratio of medians |", "|---|--:|--:|--:|"]
    for row in result["rows"]:
        cells = [" ".join(f"{one:.2f}" for one in row[name]) for name in ("with", "without")]
        lines.append(f"| {row['scope']} | {' | '.join(cells)} | {row['ratio']:.3f} |")
    return "\n".join([*lines, "", f"Goal: {result['goal']}."])
