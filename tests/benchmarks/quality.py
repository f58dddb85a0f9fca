"""Time to quality: seconds of pruning and recovery that reach what a plain run ends at, on four models.

The plain run has the masks of Wanda. It recovers submodules from the pruned weights, in four epochs of two sequences a
step with AdamW at a learning rate of 1e-3. It is compared with `scopes/submodule`, which has the same masks and the
same sequences, and with `recipes/fast`, which has masks of its own and takes the first half of the sequences.
Perplexities are those of the validation split.
"""

from pathlib import Path
from statistics import median
from typing import Any

from recon.cli.recipe_names import candidates
from recon.experiment.comparison.spec import as_arguments
from recon.experiment.recipes import Recipe
from recon.profiling.phases import PhaseName

from .bare_loop import QUICK, Size
from .fits import Fit, fit, say

MODELS = {"bundled": "bundled", **{name: f"runs/{name}/model" for name in ("deep", "gelu", "wide")}}
"""Names and places; `recon fit -c pretrain/deep` trains the second one, and so on."""

PLAIN = ("--model.start", "pruned", "--model.batch_size", "2", "--model.epochs", "4", "--model.lr", "1e-3")
FAST = "recipes/fast"
GOAL = 1 / 3


def measure(directory: Path, quick: bool = False) -> dict[str, Any]:
    """Seconds and perplexities of all three in turn; ratios of median seconds, None if the quality is not reached.

    A model that is not there is left out, with the command that trains it.
    """
    size = QUICK if quick else Size()
    ways = {"plain": ("submodule", PLAIN), "configured": ("submodule", ()), "fast": _fast(size.num_sequences // 2)}
    rows = []
    for model, place in ({"bundled": "bundled"} if quick else MODELS).items():
        if model != "bundled" and not Path(place).is_dir():
            say(f"quality: {place} is left out, for it is not there; recon fit -c pretrain/{model} trains it")
            continue
        row: dict[str, Any] = {"model": model}
        common = (
            *size.data_options,
            "--evaluate_on",
            "validation",
            "--trainer.accelerator",
            "cpu",
            "--model.name",
            place,
        )
        for repeat in range(size.repeats):
            for way, (scope, options) in ways.items():
                run = fit(scope, directory / f"{model}-{way}-{repeat}", *common, *options)
                row.setdefault(f"{way}_seconds", []).append(seconds(run))
                row[f"{way}_perplexity"] = run.report["perplexity"]
                say(f"quality: {model}, {way}: {run.report['perplexity']:.3f} in {seconds(run):.2f} s")
        for way in ("configured", "fast"):
            row[f"{way}_ratio"] = ratio(row, way)
        rows.append(row)
    return {"goal": GOAL, "size": vars(size), "rows": rows}


def ratio(row: dict[str, Any], way: str) -> float | None:
    """Median seconds of a way over those of the plain run; None if it ends at a higher perplexity."""
    if row[f"{way}_perplexity"] > row["plain_perplexity"]:
        return None
    return median(row[f"{way}_seconds"]) / median(row["plain_seconds"])


def seconds(run: Fit) -> float:
    """Of the choice of the masks and of the recovery."""
    return run.seconds + sum(phase["seconds"] for phase in run.memory["phases"] if phase["phase"] == PhaseName.PRUNE)


def _fast(num_sequences: int) -> tuple[str, tuple[str, ...]]:
    """Scope and options of the only stage of `recipes/fast`, on fewer sequences."""
    (stage,) = Recipe.of(FAST, candidates(FAST)[FAST]).stages
    scope, *configs = stage.config
    more = (part for name in configs for part in ("-c", name))
    options = (*more, *as_arguments(stage.options), "--data.num_sequences", str(num_sequences))
    return scope.removeprefix("scopes/"), options


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per model."""
    ways = ("plain", "configured", "fast")
    lines = [
        "| model | plain, s | perplexity | `scopes/submodule`, s | perplexity | ratio | `recipes/fast`, s | perplexity "
        "| ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = [row["model"]]
        for way in ways:
            cells += [" ".join(f"{one:.2f}" for one in row[f"{way}_seconds"]), f"{row[f'{way}_perplexity']:.3f}"]
            if way != "plain":
                cells.append("not reached" if row[f"{way}_ratio"] is None else f"{row[f'{way}_ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Goal: {result['goal']:.2f} of the plain run's time."])
