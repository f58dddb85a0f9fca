"""Time to quality: seconds in which a scope, as its configuration has it, reaches what a plain run ends at.

The plain run starts from the pruned weights and makes four epochs of two sequences a step with AdamW at a learning
rate of 1e-3. Both take the same masks and the same sequences; perplexities are those of the validation split.
"""

from pathlib import Path
from statistics import median
from typing import Any

from .bare_loop import QUICK, Size
from .fits import fit, say

SCOPES = ("submodule", "block")
PLAIN = ("--model.start", "pruned", "--model.batch_size", "2", "--model.epochs", "4", "--model.lr", "1e-3")
GOAL = 1 / 3


def measure(directory: Path, quick: bool = False, scopes: tuple[str, ...] = SCOPES) -> dict[str, Any]:
    """Seconds and perplexities of both in turn, and the ratio of median seconds; None if the quality is not reached."""
    size = QUICK if quick else Size()
    common = (*size.data_options, "--evaluate_on", "validation", "--trainer.accelerator", "cpu")
    masks = fit("matrix", directory / "masks", *common).directory / "masks.safetensors"
    rows = []
    for scope in scopes:
        row: dict[str, Any] = {"scope": scope}
        for repeat in range(size.repeats):
            for name, options in (("plain", PLAIN), ("default", ())):
                run = fit(scope, directory / f"{scope}-{name}-{repeat}", *common, "--masks", str(masks), *options)
                row.setdefault(f"{name}_seconds", []).append(run.seconds)
                row[f"{name}_perplexity"] = run.report["perplexity"]
                say(f"quality: {scope}, {name}: {run.report['perplexity']:.3f} in {run.seconds:.2f} s")
        reached = row["default_perplexity"] <= row["plain_perplexity"]
        row["ratio"] = median(row["default_seconds"]) / median(row["plain_seconds"]) if reached else None
        rows.append(row)
    return {"goal": GOAL, "size": vars(size), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per scope."""
    lines = [
        "| scope | plain, s | perplexity | configured, s | perplexity | time to the plain run's quality |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = []
        for name in ("plain", "default"):
            cells += [" ".join(f"{one:.2f}" for one in row[f"{name}_seconds"]), f"{row[f'{name}_perplexity']:.2f}"]
        ratio = "not reached" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['scope']} | {' | '.join(cells)} | {ratio} |")
    return "\n".join([*lines, "", f"Goal: {result['goal']:.2f} of the plain run's time."])
