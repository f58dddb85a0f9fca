"""Planned costs of commands of `recon fit`, and the lengths that keep them within a budget."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from recon.basics.digests import digest
from recon.basics.files import read_json, write_json
from recon.basics.locks import locked
from recon.basics.manifest import Manifest
from recon.cli.plan import PlannedRun, planned_run
from recon.planner import Kind, PlanOptions
from recon.planner.budgets import cost, longest_within
from recon.report.parts import Quantity

SPEEDS = "speeds.json"
"""File of measured speeds in the directory of a comparison."""

OF_SEEDS = {"--seed_everything", "--data.sample_seed", "--masks"}
"""Options, each before its value, that decide no cost."""

LENGTH = ("epochs", "max_steps", "max_tokens", "num_sequences", "num_validation", "num_test")
"""Options that decide no speed."""


class Costs:
    """Plans commands, each once.

    Args:
        directory: Where measured speeds are kept, so that a second start chooses the same lengths.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._runs: dict[tuple[str, ...], PlannedRun] = {}
        self._speeds: dict[str, dict[Kind, float]] = {}

    def of(self, command: list[str], quantity: Quantity) -> float:
        """What a command should need of `quantity`."""
        run = self._planned(command)
        return self._cost(run, run.options, quantity)

    def within(self, command: list[str], quantity: Quantity, limit: float) -> tuple[dict[str, int], float] | None:
        """The options by which a command trains as long as `limit` allows, and what it then needs; None if it cannot.

        Raises:
            ValueError: If the command has no length to choose.
        """
        run = self._planned(command)
        if run.options.scope == "matrix":
            raise ValueError("the matrix scope has none")
        options = longest_within(run.options, limit, partial(self._cost, run, quantity=quantity))
        if options is None:
            return None
        length = {"model.epochs": options.epochs}
        if options.max_steps is not None:
            length["trainer.max_steps"] = options.max_steps
        return length, self._cost(run, options, quantity)

    def _planned(self, command: list[str]) -> PlannedRun:
        """The plan of a command, which commands of other seeds share."""
        before = [None, *command]
        decisive = tuple(arg for arg, last in zip(command, before, strict=False) if not {arg, last} & OF_SEEDS)
        if decisive not in self._runs:
            here = [] if torch.cuda.is_available() else ["--trainer.accelerator=cpu"]
            self._runs[decisive] = planned_run([*decisive[1:], *here])
        return self._runs[decisive]

    def _cost(self, run: PlannedRun, options: PlanOptions, quantity: Quantity) -> float:
        speeds = self._speeds_of(run) if quantity == "seconds" else None
        return cost(run.shape, options, quantity, speeds)

    def _speeds_of(self, run: PlannedRun) -> Mapping[Kind, float]:
        """Speeds of a run, of any length, that were measured before or are measured now."""
        options = {name: str(value) for name, value in asdict(run.options).items() if name not in LENGTH}
        key = digest([run.source.name, run.source.shape, options])
        if key not in self._speeds:
            self._speeds[key] = run.measured_speeds() if self._directory is None else self._kept(key, run)
        return self._speeds[key]

    def _kept(self, key: str, run: PlannedRun) -> dict[Kind, float]:
        assert self._directory is not None
        file = self._directory / SPEEDS
        with locked(self._directory / ".speeds.lock"):  # another start of the comparison measures the same
            cure = "delete it, then speeds are measured again"
            known = read_json(file, dict, "`match: seconds`", cure) if file.exists() else {}
            if key not in known:
                known[key] = run.measured_speeds()
                write_json(file, known, Manifest(self._directory).writing)
        return known[key]
