"""Recipes: recoveries in stages, each from the weights of the one before, and each in a process of its own."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from recon.basics.children import Children
from recon.basics.files import read_json, write_json
from recon.basics.manifest import Manifest
from recon.experiment.comparison.cell import Cell, found, outcome
from recon.experiment.comparison.spec import as_arguments
from recon.experiment.soup import Weights
from recon.report import Report, Results

log = logging.getLogger("recon")

FILE = "recipe.json"
"""In a recipe's directory: its identity, by which another recipe is refused there."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Args:
        config: Configurations merged in order, such as `[scopes/block]`; the first names the scope.
        options: Dotted options of `recon fit`, such as `model.num_blocks: 3`.
        num_seeds: Recoveries with seeds of their own, whose mean is the result of the stage.
        weights: Which of them to average, as `recon soup` has it.
    """

    config: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 1
    weights: Weights = "uniform"

    @property
    def title(self) -> str:
        """What progress lines and directories call it."""
        return Path(self.config[0]).stem


@dataclass(frozen=True)
class Recipe:
    """A named sequence of stages.

    Args:
        name: What it is called.
        stages: The first prunes; each other one starts from the weights of the one before, under the same masks.
        options: Dotted options of every stage; those of a stage beat them.
    """

    name: str
    stages: list[Stage]
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, content: Mapping[str, Any]) -> "Recipe":
        """The recipe that a configuration describes.

        Args:
            name: What it is called.
            content: `stages`, and `options` of all.

        Raises:
            ValueError: If something in it is no part of a recipe, with the number of the stage.
        """
        needs = f"recipe {name} needs"
        if unknown := sorted(content.keys() - {"stages", "options"}):
            raise ValueError(f"{needs} stages and options, got {unknown[0]}; correct it")
        stages, options = content.get("stages"), content.get("options", {})
        if not isinstance(stages, list) or not stages or not isinstance(options, dict):
            raise ValueError(f"{needs} a list of stages, and options with values, got {stages!r} and {options!r}")
        return cls(name, [_stage(name, number, one) for number, one in enumerate(stages, 1)], options)


def _stage(name: str, number: int, content: Any) -> Stage:
    known = Stage.__dataclass_fields__
    try:
        if not isinstance(content, dict) or "config" not in content:
            raise ValueError(f"a stage needs its config, such as scopes/block, got {content!r}")
        if unknown := sorted(content.keys() - known.keys()):
            raise ValueError(f"a stage has {', '.join(known)}, got {unknown[0]}")
        config = content["config"]
        given = {**content, "config": [config] if isinstance(config, str) else config}
        _require_values(given)
        return Stage(**given)
    except ValueError as error:
        raise ValueError(f"recipe {name}, stage {number}: {error}; correct it") from None


def _require_values(given: Mapping[str, Any]) -> None:
    config, options, num_seeds = given["config"], given.get("options", {}), given.get("num_seeds", 1)
    if not isinstance(config, list) or not config or not all(isinstance(name, str) for name in config):
        raise ValueError(f"config needs the names of configurations, a scope first, got {config!r}")
    if not isinstance(options, dict):
        raise ValueError(f"options needs options and values, got {options!r}")
    if type(num_seeds) is not int or num_seeds < 1:
        raise ValueError(f"num_seeds needs a number from 1, got {num_seeds!r}")
    if given.get("weights", "uniform") not in get_args(Weights):
        raise ValueError(f"weights needs one of {', '.join(get_args(Weights))}, got {given['weights']!r}")


@dataclass(frozen=True)
class StageCells:
    """The processes of one stage.

    Args:
        title: Number and name of the stage.
        recoveries: One for each seed.
        soup: Averages them; None with one seed.
    """

    title: str
    recoveries: list[Cell]
    soup: Cell | None = None

    @property
    def cells(self) -> list[Cell]:
        """All, in order."""
        return [*self.recoveries, *([] if self.soup is None else [self.soup])]

    @property
    def result(self) -> Cell:
        """The one whose model is the stage's."""
        return self.cells[-1]


def lay_out(recipe: Recipe, given: Sequence[str], seed: int, directory: Path) -> list[StageCells]:
    """The processes of a recipe.

    Args:
        recipe: The recipe.
        given: Arguments of `recon fit` for every stage, which beat those of the recipe.
        seed: Seed of the first recovery of each stage; further ones have the following seeds.
        directory: Where everything goes.
    """
    laid: list[StageCells] = []
    for number, stage in enumerate(recipe.stages, 1):
        title, is_last = f"{number}-{stage.title}", number == len(recipe.stages)
        configs = [arg for name in ["cell", *stage.config] for arg in ("-c", name)]
        common = ["fit", *configs, *as_arguments(recipe.options | stage.options)]
        common += [
            "--baselines=true" if number == 1 else "--baselines=false",
            f"--drift={str(is_last).lower()}",
            *given,
        ]
        if laid:
            common.append(f"--from={laid[-1].result.directory}")
        recoveries = []
        for one in range(seed, seed + stage.num_seeds):
            name = title if stage.num_seeds == 1 else f"{title}-seed{one}"
            command = [*common, f"--seed_everything={one}", f"--run_dir={directory / name}"]
            recoveries.append(Cell(name, command, directory / name))
        laid.append(StageCells(title, recoveries, _soup(stage, title, recoveries, directory)))
    return laid


def _soup(stage: Stage, title: str, recoveries: Sequence[Cell], directory: Path) -> Cell | None:
    if stage.num_seeds == 1:
        return None
    target = directory / f"{title}-soup"
    runs = [str(cell.directory) for cell in recoveries]
    command = ["soup", *runs, f"--weights={stage.weights}", "--summary=false", f"--run_dir={target}"]
    return Cell(target.name, command, target)


def claim(directory: Path, identity: Mapping[str, Any]) -> None:
    """Make a directory this recipe's, or go on with it.

    Args:
        directory: Of the recipe.
        identity: Options of all stages, versions and models, as JSON.

    Raises:
        ValueError: If the directory is that of another recipe.
    """
    file, cure = directory / FILE, "name another run_dir or delete this one"
    if file.exists():
        held = read_json(file, dict, "a recipe", cure)
        if held != identity:
            different = sorted(name for name in held.keys() | identity.keys() if held.get(name) != identity.get(name))
            raise ValueError(
                f"a recipe needs a new run_dir or one of this very recipe, got {directory}, which differs in "
                f"{', '.join(different)}; {cure}"
            )
        return
    write_json(file, identity, Manifest(directory).writing)


def run_stages(stages: Sequence[StageCells], directory: Path) -> list[list[Report]]:
    """Run all stages that have not ended, and write `results.json` after each.

    Returns:
        The reports of each stage: its recoveries, and the soup behind them if there is one.

    Raises:
        ValueError: If a stage failed, with its reason, or another process runs it.
    """
    reports: list[list[Report]] = []
    cells, children = [cell for stage in stages for cell in stage.cells], Children()
    try:
        for stage in stages:
            reports.append([_report(cell, cells, children) for cell in stage.cells])
            rows = compared([one for of_stage in reports for one in of_stage])
            Results(rows, name=directory.name).save(directory / "results.json", Manifest(directory).writing)
    finally:
        children.stop()
    return reports


def _report(cell: Cell, cells: Sequence[Cell], children: Children) -> Report:
    measured = found(cell)
    if measured is None:
        measured = outcome(cell, f"[{cells.index(cell) + 1}/{len(cells)} {cell.title}]", children, {})
    if isinstance(measured, Report):
        return measured
    reason = measured or "another process runs it"
    raise ValueError(f"stage {cell.title} has no result: {reason}; the same command goes on from there")


def compared(reports: Sequence[Report]) -> list[Report]:
    """The reports with the references of the first, the only one that measures them, where all were measured alike."""
    first = reports[0]
    known = {name: getattr(first, name) for name in ("dense_perplexity", "pruned_perplexity", "references")}
    return [one.replace(**known) if one.protocol == first.protocol else one for one in reports]
