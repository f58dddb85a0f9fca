"""A comparison: every recovery scope on the same masks, data and budget, each in a process of its own.

A second run of the comparison finds the finished cells and only prints. A cell that fails is shown as failed,
with its reason, and does not stop the others.

Options can be tuned: once per model and entry, on the first criterion, pattern and seed, each point of the
entry's grid is a cell that is measured on the validation split and on nothing else. All criteria, patterns and
seeds then use the choice. Nothing is chosen on the test split.
"""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from recon.basics.run_paths import RunPaths
from recon.experiment.comparison.cell import Cell, outcome
from recon.experiment.comparison.spec import Comparison, Entry, Group, Resolver, plan
from recon.experiment.comparison.tuning import Choice, choose
from recon.report import Report, Results
from recon.report.tuning import brief

log = logging.getLogger("recon")


def compare(comparison: Comparison, resolver: Resolver) -> Results:
    """Run every cell that has not finished yet, one after another; write `results.json` as rows are known.

    Args:
        comparison: What to compare.
        resolver: Knows the commands that cells run.

    Returns:
        All cells; those that failed have `status` "failed" and say why.

    Raises:
        ValueError: If a cell's options cannot be understood, before anything runs.
    """
    results = Results([], name=comparison.name)
    outcomes: dict[Path, Report | str] = {}

    def run(cell: Cell) -> Report | str:
        if cell.directory not in outcomes:
            prefix = f"[{len(outcomes) + 1}/{comparison.num_cells} {cell.title}]"
            outcomes[cell.directory] = outcome(cell, prefix)
        return outcomes[cell.directory]

    groups = [list(plan(comparison, model, resolver)) for model in comparison.models]
    _require_readable(comparison.recoveries, groups)
    for of_model in groups:
        choices: list[Choice] = []
        for group in of_model:
            dense, pruned = run(group.dense), run(group.pruned)
            row = partial(_row, group, dense, pruned)
            results.cells.extend([row("dense", "", group.dense, dense), row("pruned", "", group.pruned, pruned)])
            results.save(comparison.path / "results.json")
            choices = choices or [_tune(group, entry, run) for entry in comparison.recoveries]
            for entry, choice in zip(comparison.recoveries, choices, strict=True):
                cell = group.recovery(entry, choice.options)
                measured = choice.error or run(cell)
                results.cells.append(row(entry.scope, entry.label, cell, measured, choice.tried))
                results.save(comparison.path / "results.json")
    return results


def _require_readable(recoveries: list[Entry], groups: list[list[Group]]) -> None:
    """Refuse a comparison whose cells are no commands of recon, before the first of them runs."""
    for group in (group for of_model in groups for group in of_model):
        for entry in recoveries:
            try:
                group.recovery(entry, {})
                group.trials(entry)
            except ValueError as error:
                raise ValueError(f"recoveries: {entry.title!r} cannot run: {error}") from error


def _tune(group: Group, entry: Entry, run: Callable[[Cell], Report | str]) -> Choice:
    """The options of `entry` that reach the lowest validation perplexity on a group."""
    trials = [(point, cell, run(cell)) for point, cell in group.trials(entry)]
    for _, cell, measured in trials:
        if isinstance(measured, Report):  # the weights are of no use any more, and as large as the model
            for product in (RunPaths(cell.directory).model, RunPaths(cell.directory).windows):
                shutil.rmtree(product, ignore_errors=True)
    choice = choose([point for point, _, _ in trials], [measured for _, _, measured in trials])
    if choice.options:
        log.info(f"{entry.title}: {brief(choice.options)} chosen of {len(trials)} on the validation split")
    return choice


def _row(
    group: Group,
    dense: Report | str,
    pruned: Report | str,
    scope: str,
    label: str | None,
    cell: Cell,
    measured: Report | str,
    tried: list[dict[str, Any]] | None = None,
) -> Report:
    """A row of a group, with the perplexities that it is compared with, or why it failed."""
    known: dict[str, Any] = {
        "scope": scope,
        "model": group.model.get("name", "bundled"),
        "criterion": group.criterion,
        "pattern": group.pattern,
        "seed": group.seed,
        "tuning": tried or [],
    }
    if isinstance(measured, str):
        return Report(
            label=label or "",
            status="failed",
            error=measured,
            run_dir=str(cell.directory) if cell.directory.exists() else "",
            **known,
        )
    return measured.replace(
        label=measured.label if label is None else label,
        dense_perplexity=dense.perplexity if isinstance(dense, Report) else None,
        pruned_perplexity=pruned.perplexity if isinstance(pruned, Report) else None,
        **known,
    )
