"""A comparison: every recovery scope on the same masks, data and budget, each in a process of its own.

A second run of the comparison finds the finished cells and only prints. A cell that fails is shown as failed,
with its reason, and does not stop the others.

Options can be tuned: once per model and entry, on the first text, criterion, pattern and seed, each point of the
entry's grid is a cell that is measured on the validation split and on nothing else. All texts, criteria,
patterns and seeds then use the choice. Nothing is chosen on the test split.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from recon.basics.manifest import Manifest
from recon.basics.run_paths import RunPaths
from recon.experiment.comparison.cell import Cell
from recon.experiment.comparison.cells import Cells
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.pool import Pool, Processes
from recon.experiment.comparison.resolver import Resolver
from recon.experiment.comparison.spec import Comparison, Group, plan
from recon.experiment.comparison.tuning import Choice, choose
from recon.report import Report, Results
from recon.report.paired import differences
from recon.report.tuning import brief

log = logging.getLogger("recon")


class ModelCells:
    """The cells of one model, and the options that were chosen for them.

    Args:
        recoveries: What to compare.
        groups: All of the model.
    """

    def __init__(self, recoveries: Sequence[Entry], groups: Sequence[Group]) -> None:
        self._recoveries, self._groups = recoveries, groups
        self._trials = [groups[0].trials(entry) for entry in recoveries]
        self._choices: dict[int, Choice] = {}
        self._fits: dict[tuple[int, int], Cell] = {}

    def rows(self, cells: Cells) -> Iterator[Report]:
        """Go through all cells once; the rows of those that are known."""
        for number, group in enumerate(self._groups):
            dense, pruned = cells.get(group.dense), cells.get(group.pruned)
            if pruned is None:  # recoveries need its masks
                continue
            row = partial(_row, group, dense, pruned)
            if dense is not None:
                yield row("dense", "", group.dense, dense)
                yield row("pruned", "", group.pruned, pruned)
            if number == 0:
                self._choose(cells)
            for index, choice in sorted(self._choices.items()):
                entry, cell = self._recoveries[index], self._fit(number, index)
                measured = choice.error or cells.get(cell)
                if measured is not None:
                    yield row(entry.scope, entry.label, cell, measured, choice.tried)

    def _fit(self, number: int, index: int) -> Cell:
        """The cell of a recovery in a group; its directory is looked for once."""
        if (number, index) not in self._fits:
            options = self._choices[index].options
            self._fits[number, index] = self._groups[number].recovery(self._recoveries[index], options)
        return self._fits[number, index]

    def _choose(self, cells: Cells) -> None:
        """Choose the options of each recovery whose trials are known, by the lowest validation perplexity."""
        for index, trials in enumerate(self._trials):
            if index in self._choices:
                continue
            outcomes = [cells.get(cell) for _, cell in trials]
            known = [measured for measured in outcomes if measured is not None]
            if len(known) < len(trials):
                continue
            for (_, cell), measured in zip(trials, known, strict=True):
                if isinstance(measured, Report):
                    _drop_weights(cell)
            choice = self._choices[index] = choose([point for point, _ in trials], known)
            if choice.options:
                title = self._recoveries[index].title
                log.info(f"{title}: {brief(choice.options)} chosen of {len(trials)} on the validation split")


def compare(comparison: Comparison, resolver: Resolver, pool: Pool | None = None) -> Results:
    """Run every cell that has not finished yet; write `results.json` as rows are known.

    Another process may run the same comparison at the same time. Then each takes the next cells that are free, and
    waits for those of the other when nothing else is left.

    Args:
        comparison: What to compare.
        resolver: Knows the commands that cells run.
        pool: Runs cells; if None, one child process at a time.

    Returns:
        All cells; those that failed have `status` "failed" and say why.

    Raises:
        ValueError: If a cell's options cannot be understood, before anything runs.
    """
    planned = [list(plan(comparison, model, resolver)) for model in comparison.models]
    _require_readable(comparison.recoveries, planned)
    models = [ModelCells(comparison.recoveries, groups) for groups in planned]
    results, file = Results([], name=comparison.name), comparison.path / "results.json"
    with Cells(comparison.num_cells, pool or Processes()) as cells:
        while True:
            cells.begin_pass()
            rows = [list(model.rows(cells)) for model in models]
            num_before, results.cells[:] = len(results.cells), chain.from_iterable(rows)
            if cells.are_known:
                results.differences[:] = chain.from_iterable(differences(Results(one)) for one in rows)
            if cells.are_known or len(results.cells) > num_before:
                results.save(file, Manifest(comparison.path).writing)
            if cells.are_known:
                return results
            cells.wait()


def _require_readable(recoveries: Sequence[Entry], planned: Sequence[Sequence[Group]]) -> None:
    """Refuse a comparison whose cells are no commands of recon, before the first of them runs."""
    for group in (group for groups in planned for group in groups):
        for entry in recoveries:
            try:
                if not group.trials(entry):
                    group.recovery(entry, {})
            except ValueError as error:
                raise ValueError(f"recoveries: {entry.title!r} cannot run: {error}") from error


def _drop_weights(cell: Cell) -> None:
    """Delete the weights of a trial: they are of no use any more, and as large as the model."""
    paths = RunPaths(cell.directory)
    for product in (paths.model, paths.windows):
        paths.manifest.forget(product)
        shutil.rmtree(product, ignore_errors=True)


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
        "text": group.text,
        "criterion": group.criterion,
        "pattern": group.pattern,
        "seed": group.seed,
        "tuning": tried or [],
        "budget": cell.budget,
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
        references=_references(measured, dense, pruned),
        dense_perplexity=dense.perplexity if isinstance(dense, Report) else None,
        pruned_perplexity=pruned.perplexity if isinstance(pruned, Report) else None,
        **known,
    )


def _references(measured: Report, dense: Report | str | None, pruned: Report | str) -> dict[str, dict[str, Any]]:
    """What a row says of the models that it is compared with, and their scores on tasks, which their cells measured."""
    rows = {"dense": dense, "pruned": pruned}
    known = {name: {"tasks": row.tasks} for name, row in rows.items() if isinstance(row, Report) and row.tasks}
    return measured.references | {name: measured.references.get(name, {}) | tasks for name, tasks in known.items()}
