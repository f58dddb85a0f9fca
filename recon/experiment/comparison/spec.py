"""What a comparison runs: models x texts x criteria x refinements x patterns x allocations x seeds x recoveries.

Each cell is a command. Its directory is named by that, by what the configurations in it say, and by the contents of
model and data: the same cell is found again, whatever it is called, and another one under the same names is not taken
for it. Cells whose options are tuned are made when the options have been chosen.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from recon.basics.digests import digest
from recon.evaluation.tasks.options import TaskOptions
from recon.experiment.comparison.budgets import Budgets
from recon.experiment.comparison.cell import Cell
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.resolver import Resolver
from recon.experiment.comparison.tuning import grid
from recon.experiment.environment import versions
from recon.models.loading import ModelSource
from recon.pruning.allocation import Allocation
from recon.pruning.criteria import Criterion
from recon.pruning.patterns import Pattern
from recon.pruning.refinement import Refinement
from recon.report.parts import Quantity
from recon.report.tuning import brief

OF_CALIBRATION = ("data.source", "data.num_sequences")
"""Options of the data that do not decide the test text where `data.held_out` does."""

OF_LENGTH = ("model.epochs", "trainer.max_steps")
"""Options that `match` decides."""

ClassSpec = dict[str, Any]
"""A class by `class_path` and `init_args`, as in every configuration file."""


@dataclass
class Text:
    """One calibration text to compare.

    Args:
        label: What reports call it.
        options: Dotted options of the data, such as `data.source: SelfGenerated` and `data.num_sequences: 32`.

    Raises:
        ValueError: If an option is none of the data.
    """

    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if other := [name for name in self.options if not name.startswith("data.")]:
            raise ValueError(f"texts: {self.label!r} needs options of the data, such as data.source, got {other[0]}")


@dataclass
class Comparison:
    """What to compare: the product of models, texts, criteria, refinements, patterns, allocations, seeds, recoveries.

    Args:
        name: What it is called; its directory is runs/<name>.
        recoveries: The scopes to compare.
        criteria: How weights are chosen.
        refinements: How masks are improved, null for not at all.
        patterns: Which zeros are allowed.
        allocations: How densities differ from block to block, null for not at all.
        models: Options of the model: `name`, and others as in `recon fit --model.<option>`.
        seeds: Each chooses calibration sequences and their order; test sequences are shared.
        texts: Calibration texts, with options of the data that differ; pruning and recovery use the same one. That of
            `data` if empty.
        data: Options of the data, the same for every cell.
        options: Options of every `recon fit`.
        directory: Where to write instead.
        tasks: The tasks that every row is scored on.
        match: Hold the planned tokens, FLOPs or seconds of all recoveries equal. Their epochs, or steps of full
            retraining, are the most within the budget of `match_to`.
        match_to: Title of the recovery whose cost, with its own epochs, is the budget; the one that costs most if null.
        resample: Whether a seed also chooses the validation and the test sequences, as `data.sample_seed`, so that
            deviations over seeds have the choice of these in them. The dense model is then measured with each seed.
    """

    name: str
    recoveries: list[Entry]
    criteria: list[ClassSpec] = field(default_factory=lambda: [{"class_path": "recon.criteria.Wanda"}])
    refinements: list[ClassSpec | None] = field(default_factory=lambda: [None])
    patterns: list[ClassSpec] = field(default_factory=lambda: [{"class_path": "recon.patterns.Unstructured"}])
    allocations: list[ClassSpec | None] = field(default_factory=lambda: [None])
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "bundled"}])
    seeds: list[int] = field(default_factory=lambda: [0])
    texts: list[Text] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    directory: str | None = None
    tasks: TaskOptions = field(default_factory=TaskOptions)
    match: Quantity | None = None
    match_to: str | None = None
    resample: bool = False

    def __post_init__(self) -> None:
        self.texts = self.texts or [Text()]
        for name in ("recoveries", "criteria", "refinements", "patterns", "allocations", "models", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"a comparison needs at least one of its {name}, got none; name one, or leave it out")
        self._require_budget([entry.title for entry in self.recoveries])
        if self.resample and not isinstance(self.data.get("num_test"), int):
            raise ValueError(
                f"resample needs data.num_test, a number of test sequences to choose, got "
                f"{self.data.get('num_test')!r}; give one below that of the split"
            )
        known = [field.name for field in fields(ModelSource)]
        for model in self.models:
            if unknown := [name for name in model if name not in known]:
                raise ValueError(f"models: a model has {', '.join(known)}, got {unknown[0]}; correct it")
            if not isinstance(model.get("name", ""), str):
                raise ValueError(f"models: name needs a text, got {model['name']!r}; correct it")

    def _require_budget(self, titles: Sequence[str]) -> None:
        """Refuse a budget that is nobody's, or lengths that are both matched and tuned."""
        if self.match is not None and (twice := [title for title in titles if titles.count(title) > 1]):
            raise ValueError(f"match needs labels of recoveries that differ, got {twice[0]!r} twice; change one")
        if self.match_to is not None and (self.match is None or self.match_to not in titles):
            raise ValueError(
                f"match_to needs `match` and the title of a recovery, {', '.join(titles)}, got {self.match_to!r} with "
                f"match {self.match}; correct it, or leave it out"
            )
        if self.match is not None and not any(entry.matched for entry in self.recoveries):
            raise ValueError("match needs a recovery with `matched: true`, got none; leave out `matched` of one")
        for entry in self.recoveries if self.match is not None else ():
            if entry.matched and (tuned := [name for name in OF_LENGTH if name in entry.tune]):
                raise ValueError(
                    f"match decides how long {entry.title!r} trains, got {tuned[0]} to tune; tune something else, or "
                    f"give it `matched: false`"
                )

    @property
    def path(self) -> Path:
        """Where everything goes."""
        return Path(self.directory or f"runs/{self.name}")

    @property
    def num_cells(self) -> int:
        """Child processes in all: per model dense ones and those of the grids, per group pruning and recoveries."""
        num_masks = len(self.criteria) * len(self.refinements) * len(self.patterns) * len(self.allocations)
        num_groups = num_masks * len(self.seeds) * len(self.texts)
        num_dense = len({json.dumps(self.tested(text)) for text in self.texts}) * (
            len(self.seeds) if self.resample else 1
        )
        num_points = sum(len(grid(entry.tune)) for entry in self.recoveries)
        return len(self.models) * (num_dense + num_points + num_groups * (1 + len(self.recoveries)))

    def tested(self, text: Text) -> dict[str, Any]:
        """The options of a text by which the dense model is measured: those of texts with one test split are equal."""
        own_test = "held_out" not in self.data and "data.held_out" not in text.options
        return {name: one for name, one in text.options.items() if own_test or name not in OF_CALIBRATION}


@dataclass(frozen=True)
class Group:
    """The cells that are compared with each other: one model, text, criterion, pattern and seed.

    Args:
        model: Options of the model.
        text: What reports call the calibration text; empty where a comparison has one.
        criterion: What reports call the criterion; likewise `pattern`.
        pattern: See `criterion`.
        seed: Of calibration sequences and their order.
        dense: Measures the dense model.
        pruned: Makes the masks that all recoveries share, and measures the pruned model.
        fit: Makes the cell of a recovery from its title, its entry, and options that precede the entry's.
    """

    model: dict[str, Any]
    text: str
    criterion: str
    pattern: str
    seed: int
    dense: Cell
    pruned: Cell
    fit: Callable[..., Cell]

    def recovery(self, entry: Entry, chosen: dict[str, Any]) -> Cell:
        """The cell that recovers as `entry` says, with the options that were chosen for it."""
        return self.fit(entry.title, entry, chosen)

    def trials(self, entry: Entry) -> list[tuple[dict[str, Any], Cell]]:
        """The points of the entry's grid, each with the cell that measures it on the validation split."""
        return [
            (point, self.fit(f"tune {entry.title} {brief(point)}", entry, point | TRIAL)) for point in grid(entry.tune)
        ]


TRIAL = {"evaluate_on": "validation", "drift": False}
"""Options of a cell of a grid: what it measures, and that it measures nothing else."""


def plan(comparison: Comparison, model: dict[str, Any], resolver: Resolver) -> Iterator[Group]:
    """The groups of one model of a comparison, which make the commands to run.

    Args:
        comparison: What to compare.
        model: One of its models.
        resolver: See there.
    """
    silent = ["--summary", "false"]
    text = [f"--data={json.dumps(comparison.data)}"] if comparison.data else []
    identity = {"model": ModelSource(**model).identity(), "versions": versions()}
    # One precision for all rows: on a GPU local scopes would have that of the files, full retraining float32.
    of_tasks = _of_tasks(comparison.tasks)
    of_model = as_arguments({"dtype": "float32"} | model if resolver.on_gpu else model, "model")

    def cell(title: str, command: list[str], scored: bool = True, budget: dict[str, Any] | None = None) -> Cell:
        tasks = of_tasks if scored else []
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        # Of tasks, what decides their scores: a cell goes on with smaller batches after memory ran out.
        resolved = resolver.resolved([*command, *tasks])
        key = digest([command, resolved, identity])[:8]
        # A title is only what people read: the cell is found again under another one.
        found = sorted(comparison.path.glob(f"*-{key}"))
        directory = found[0] if found else comparison.path / f"{slug}-{key}"
        command = [*command, *tasks, "--run_dir", str(directory)]
        return Cell(title, command, directory, budget or {}, *_processes(resolved["options"].get("trainer", {})))

    named = [option for option in of_model if not option.startswith("--model.name=")]
    for calibration, criterion, refinement, pattern, allocation, seed in product(
        comparison.texts,
        comparison.criteria,
        comparison.refinements,
        comparison.patterns,
        comparison.allocations,
        comparison.seeds,
    ):
        sample = ["--data.sample_seed", str(seed)] if comparison.resample else []
        tested = [*as_arguments(comparison.tested(calibration)), *sample]
        dense = cell("dense", ["test", model.get("name", "bundled"), *named, *text, *tested, *silent])
        chosen = [f"--criterion={json.dumps(criterion)}", f"--pattern={json.dumps(pattern)}"]
        of_criterion, of_pattern = resolver.describe(Criterion, criterion), resolver.describe(Pattern, pattern)
        if refinement is not None:
            chosen.append(f"--refinement={json.dumps(refinement)}")
            of_criterion += f" + {resolver.describe(Refinement, refinement)}"
        if allocation is not None:
            chosen.append(f"--pruning.allocation={json.dumps(allocation)}")
            of_pattern += f", {resolver.describe(Allocation, allocation)}"
        seeded = ["--seed_everything", str(seed), *sample]
        common = [*of_model, *text, *as_arguments(calibration.options), *chosen, *seeded]
        pruned = cell("pruned", ["prune", *common, "--baselines", "false", *silent])
        masks = ["--masks", str(pruned.directory / "masks.safetensors")]
        fitted = Fits(comparison, resolver, common, masks, cell)
        yield Group(model, calibration.label, of_criterion, of_pattern, seed, dense, pruned, fitted)


@dataclass(frozen=True)
class Fits:
    """Makes the cells of the recoveries of one group.

    Args:
        comparison: What to compare.
        resolver: See there.
        common: Arguments of all commands of the group.
        masks: Arguments that name the group's masks.
        cell: Makes a cell from a title, a command, whether it is scored on tasks, and a budget.
    """

    comparison: Comparison
    resolver: Resolver
    common: list[str]
    masks: list[str]
    cell: Callable[..., Cell]

    def __call__(self, title: str, entry: Entry, chosen: dict[str, Any]) -> Cell:
        """The cell of a recovery with the options of a point of its grid, and with those that its budget gives."""
        budget = {} if self.budgets is None else self.budgets.of(entry, chosen)
        command = self.command(entry, chosen | budget.get("options", {}))
        return self.cell(title, command, scored=not TRIAL.items() <= chosen.items(), budget=budget)

    @cached_property
    def budgets(self) -> Budgets | None:
        """What is held equal; None without `match`."""
        asked = self.comparison
        if asked.match is None:
            return None
        return Budgets(asked.match, asked.match_to, asked.recoveries, self.command, self.resolver)

    def command(self, entry: Entry, chosen: dict[str, Any]) -> list[str]:
        """The command of a recovery, before it has a directory."""
        configs = [arg for name in ["cell", *entry.config] for arg in ("-c", name)]
        options = self.comparison.options | entry.options | chosen
        # Where recovery chooses its masks on the way, it has none to begin with.
        masks = [] if options.get("pruning.inputs") == "recovered" else self.masks
        return ["fit", *configs, *self.common, *masks, "--baselines", "false", *as_arguments(options)]


def _processes(trainer: dict[str, Any]) -> tuple[int, int]:
    """The processes on each node, and the nodes, that a trainer asks for; one where it takes what is there."""
    devices = trainer.get("devices", 1)
    number = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, number), trainer.get("num_nodes", 1)


def _of_tasks(tasks: TaskOptions) -> list[str]:
    """Command-line options for tasks; none without tasks."""
    given = {name: value for name, value in vars(tasks).items() if value is not None}
    return as_arguments(given | {"tasks": list(tasks.names)}) if tasks.names else []


def as_arguments(options: dict[str, Any], prefix: str = "") -> list[str]:
    """Command-line options for (dotted) names and values."""
    dotted = f"{prefix}." if prefix else ""
    return [
        f"--{dotted}{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
    ]
