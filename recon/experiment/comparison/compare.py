"""A comparison: every recovery scope on the same masks, data and budget, each in a process of its own.

A second run of the comparison finds the finished cells and only prints. A cell that fails is shown as failed,
with its reason, and does not stop the others.

Options can be tuned: once per model and entry, on the first criterion, pattern and seed, each point of the
entry's grid is a cell that is measured on the validation split and on nothing else. All criteria, patterns and
seeds then use the choice. Nothing is chosen on the test split.
"""

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recon.basics.manifest import Manifest
from recon.basics.run_paths import RunPaths
from recon.experiment.comparison.cell import Cell, outcome, wait_for
from recon.experiment.comparison.spec import Comparison, Entry, Group, Resolver, plan
from recon.experiment.comparison.tuning import Choice, choose
from recon.report import Report, Results
from recon.report.tuning import brief

log = logging.getLogger("recon")


class Cells:
    """The cells of a comparison that this process knows or runs.

    Several processes may run one comparison: each takes cells that nobody else runs, and passes over the others.

    Args:
        num: How many cells there are in all.

    Attributes:
        busy: Cells of other processes that the present pass went by.
        took: Whether the present pass has found or run a cell that was not known before.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._outcomes: dict[Path, Report | str] = {}
        self.begin_pass()

    def begin_pass(self) -> None:
        """Go through the comparison again."""
        self.busy: list[Cell] = []
        self.took = False

    def run(self, cell: Cell) -> Report | str | None:
        """What `cell` came to: known, found or run now; None while another process runs it."""
        if cell.directory not in self._outcomes:
            found = outcome(cell, f"[{len(self._outcomes) + 1}/{self._num} {cell.title}]")
            if found is None:
                self.busy.append(cell)
                return None
            self._outcomes[cell.directory], self.took = found, True
        return self._outcomes[cell.directory]


def compare(comparison: Comparison, resolver: Resolver) -> Results:
    """Run every cell that has not finished yet, one after another; write `results.json` as rows are known.

    Another process may run the same comparison at the same time. Then each takes the next cell that is free, and waits
    for those of the other when nothing else is left.

    Args:
        comparison: What to compare.
        resolver: Knows the commands that cells run.

    Returns:
        All cells; those that failed have `status` "failed" and say why.

    Raises:
        ValueError: If a cell's options cannot be understood, before anything runs.
    """
    cells = Cells(comparison.num_cells)
    planned = [list(plan(comparison, model, resolver)) for model in comparison.models]
    _require_readable(comparison.recoveries, planned)
    while True:
        cells.begin_pass()
        results = _pass(comparison, planned, cells)
        if not cells.busy:
            return results
        if not cells.took:
            log.info(f"wait for {cells.busy[0].title}, which another process runs")
            wait_for(cells.busy[0])


def _pass(comparison: Comparison, planned: Sequence[Sequence[Group]], cells: Cells) -> Results:
    """Go through all cells once; the rows of those that are known in the end, which are all if none is busy."""
    results = Results([], name=comparison.name)
    for groups in planned:
        choices: list[Choice | None] = [None] * len(comparison.recoveries)
        for group in groups:
            dense, pruned = cells.run(group.dense), cells.run(group.pruned)
            if pruned is None:  # recoveries need its masks
                continue
            row = partial(_row, group, dense, pruned)
            if dense is not None:
                results.cells.extend([row("dense", "", group.dense, dense), row("pruned", "", group.pruned, pruned)])
                _save(results, comparison, cells)
            if group is groups[0]:
                choices = [_tune(group, entry, cells) for entry in comparison.recoveries]
            for entry, choice in zip(comparison.recoveries, choices, strict=True):
                if choice is None:
                    continue
                cell = group.recovery(entry, choice.options)
                measured = choice.error or cells.run(cell)
                if measured is not None:
                    results.cells.append(row(entry.scope, entry.label, cell, measured, choice.tried))
                    _save(results, comparison, cells)
    return results


def _save(results: Results, comparison: Comparison, cells: Cells) -> None:
    """Write the rows; a process that waits for others' cells leaves a longer file as it is."""
    if not cells.busy:
        results.save(comparison.path / "results.json", Manifest(comparison.path).writing)


def _require_readable(recoveries: Sequence[Entry], planned: Sequence[Sequence[Group]]) -> None:
    """Refuse a comparison whose cells are no commands of recon, before the first of them runs."""
    for group in (group for groups in planned for group in groups):
        for entry in recoveries:
            try:
                group.recovery(entry, {})
                group.trials(entry)
            except ValueError as error:
                raise ValueError(f"recoveries: {entry.title!r} cannot run: {error}") from error


def _tune(group: Group, entry: Entry, cells: Cells) -> Choice | None:
    """The options of `entry` that reach the lowest validation perplexity on a group; None while a trial runs."""
    trials = [(point, cell, cells.run(cell)) for point, cell in group.trials(entry)]
    known = [(point, cell, measured) for point, cell, measured in trials if measured is not None]
    if len(known) < len(trials):
        return None
    for _, cell, measured in known:
        if isinstance(measured, Report):  # the weights are of no use any more, and as large as the model
            paths = RunPaths(cell.directory)
            for product in (paths.model, paths.windows):
                paths.manifest.forget(product)
                shutil.rmtree(product, ignore_errors=True)
    choice = choose([point for point, _, _ in known], [measured for _, _, measured in known])
    if choice.options:
        log.info(f"{entry.title}: {brief(choice.options)} chosen of {len(trials)} on the validation split")
    return choice


def _row(
    group: Group,
    dense: Report | str | None,
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
