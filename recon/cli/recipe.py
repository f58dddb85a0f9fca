"""`recon fit` and `recon plan` with a recipe: recoveries in stages, chosen by limits of memory and time."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.measure import Measurement

from recon.basics.digests import digest
from recon.basics.locks import owned
from recon.basics.refusals import UsageError
from recon.basics.units import in_bytes
from recon.cli.command_line import CommandLine
from recon.cli.errors import usage
from recon.cli.plan import prediction_of
from recon.cli.quiet import quiet
from recon.cli.recipe_names import candidates, split
from recon.cli.report import table_of
from recon.cli.resolver import CommandResolver
from recon.experiment.environment import versions
from recon.experiment.recipes import Recipe, StageCells, claim, lay_out, run_stages
from recon.models.loading import ModelSource
from recon.planner.recipes import RecipeNeeds, choose, needs_section
from recon.report import table_console
from recon.report.recipe import recipe_section
from recon.report.sections import WIDEST, Section

PLACE = Path("recipe")
"""Stands for the directory of a recipe until it is known."""

OF_PLACE = ("run_dir", "from")
"""Options of a stage that only say where something is."""


def build_parser(command: str) -> ArgumentParser:
    """The parser of the options that belong to a recipe as a whole; stages have all others."""
    parser = ArgumentParser(prog=f"recon {command}", exit_on_error=False, description="Recover in stages.")
    parser.add_argument("--run_dir", type=str | None, default=None, help="Where all stages go.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed; of several, that of the first.")
    parser.add_argument("--device_memory", type=str | None, default=None, help="Of one device, such as 24GiB.")
    parser.add_argument("--minutes", type=float | None, default=None, help="Time for all recoveries.")
    parser.add_argument(
        "--flop_rate", type=float | str | None, default=None, help="As in `recon plan`; measured here without a GPU."
    )
    parser.add_argument("--summary", type=bool, default=True, help="Print the stages as a table in the end.")
    return parser


def main(args: list[str], command: str = "fit") -> int:
    """Parse, predict, choose, run, report."""
    quiet()
    name, others = split(args)
    assert name is not None
    parser = build_parser(command)
    with usage():
        line = CommandLine.read(others)
        own = {action.dest for action in parser._actions}
        config = parser.parse_args([arg for one in line.items if one.name in own for arg in one.arguments()])
        memory = None if config.device_memory is None else in_bytes(config.device_memory)
    given = [arg for one in line.configs for arg in ("-c", one.path)]
    given += [arg for one in line.items if one.name not in own for arg in one.arguments()]
    with usage():
        recipes = [Recipe.of(one, content) for one, content in candidates(name).items()]
    console, seed = Console(highlight=False, soft_wrap=True, markup=False), config.seed_everything
    limited = memory is not None or config.minutes is not None or command == "plan"
    recipe = recipes[0]
    if limited:
        rate = _flop_rate(config)
        known = [_needs(one, lay_out(one, given, seed, PLACE), rate) for one in recipes]
        _print(needs_section(known))
        chosen, why = choose(known, memory, config.minutes)
        recipe = recipes[known.index(chosen)]
        console.print(why)
    if command == "plan":
        return 0
    identity = _identity(recipe, lay_out(recipe, given, seed, PLACE))
    directory = Path(config.run_dir or f"runs/{Path(recipe.name).stem}-{digest(identity)[:8]}")
    stages = lay_out(recipe, given, seed, directory)
    with owned(directory):
        claim(directory, identity)
        reports = run_stages(stages, directory)
    if config.summary:
        titles = [stage.title for stage in stages]
        _print(recipe_section(recipe.name, dict(zip(titles, reports, strict=True))))
    console.print(f"recipe directory {directory}: model in {stages[-1].result.directory / 'model'}, results.json")
    return 0


def _flop_rate(config: Any) -> float | str | None:
    """The given speed; without a GPU and for a limit of time, that of this machine."""
    wants_own = config.minutes is not None and config.flop_rate is None and not torch.cuda.is_available()
    return "measure" if wants_own else config.flop_rate


def _needs(recipe: Recipe, stages: Sequence[StageCells], flop_rate: float | str | None) -> RecipeNeeds:
    """The predicted needs of a recipe.

    Raises:
        UsageError: If a stage has options that cannot be understood, or that cannot be planned.
    """
    found = []
    for stage in stages:
        with _named(recipe, stage):
            found.append((len(stage.recoveries), prediction_of(stage.recoveries[0].command[1:], flop_rate)))
    return RecipeNeeds(recipe.name, found)


def _identity(recipe: Recipe, stages: Sequence[StageCells]) -> dict[str, Any]:
    """What makes two recipes the same, once every stage was parsed and built: options, data, model and versions.

    Raises:
        UsageError: If a stage has options that cannot be understood.
    """
    resolver, found = CommandResolver(), dict[str, Any]()
    for stage in stages:
        for cell in stage.recoveries:
            with _named(recipe, stage):
                resolved = resolver.resolved(cell.command)
            options = {name: one for name, one in resolved["options"].items() if name not in OF_PLACE}
            given = options["model"]["init_args"]
            source = ModelSource(**{key: given[key] for key in ModelSource.__dataclass_fields__ if key in given})
            found[cell.title] = digest([options, resolved["text"], source.identity()])
        if stage.soup is not None:
            found[stage.soup.title] = [one for one in stage.soup.command if one.startswith("--weights=")]
    return json.loads(json.dumps(found | versions()))


@contextmanager
def _named(recipe: Recipe, stage: StageCells) -> Iterator[None]:
    """Say of which stage a mistake is."""
    try:
        with usage():
            yield
    except UsageError as error:
        raise UsageError(f"{recipe.name}, stage {stage.title}: {error}") from error


def _print(section: Section) -> None:
    console, table = table_console(), table_of(section)
    for column in table.columns:
        column.no_wrap = True
    table.width = Measurement.get(console, console.options.update_width(WIDEST), table).maximum
    console.print(section.title, style="bold")
    console.print(table, crop=False)
    for note in section.notes:
        console.print(note)
