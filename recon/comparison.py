"""A comparison: every recovery scope on the same masks, data and budget, each in a process of its own.

A cell is one command of recon's, run as a child process so that its peaks are its own. Its directory
carries its fingerprint: a second run of the comparison finds the finished cells and only prints. A cell
that fails is shown as failed, with its reason, and does not stop the others.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recon.criteria import Criterion
from recon.environment import versions
from recon.patterns import Pattern
from recon.pretrained import ModelSource
from recon.report import Report, Results
from recon.run import digest

ClassSpec = dict[str, Any]
"""A class by `class_path` and `init_args`, as in every configuration file."""


@dataclass
class Entry:
    """One recovery to compare.

    Args:
        scope: What reports call it: matrix, submodule, block or full.
        config: Configurations merged in order, such as `[scopes/full, strategies/zero2]`.
        options: Dotted options of `recon fit`, such as `model.lr: 5.0e-4`.
        label: How tables call it; the scope decides if not given.
    """

    scope: str
    config: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    label: str | None = None

    def __post_init__(self) -> None:
        self.config = self.config or [f"scopes/{self.scope}"]


@dataclass
class Comparison:
    """What to compare: the product of models, criteria, patterns, seeds and recoveries.

    Args:
        name: What it is called; its directory is runs/<name>.
        recoveries: The scopes to compare.
        criteria: How weights are chosen.
        patterns: Which zeros are allowed.
        models: Options of the model: `name`, and others as in `recon fit --model.<option>`.
        seeds: Each chooses calibration sequences and their order; test sequences are shared.
        data: Options of the data, the same for every cell.
        options: Options of every `recon fit`.
        directory: Where to write instead.
    """

    name: str
    recoveries: list[Entry]
    criteria: list[ClassSpec] = field(default_factory=lambda: [{"class_path": "recon.criteria.Wanda"}])
    patterns: list[ClassSpec] = field(default_factory=lambda: [{"class_path": "recon.patterns.Unstructured"}])
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "bundled"}])
    seeds: list[int] = field(default_factory=lambda: [0])
    data: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    directory: str | None = None

    def __post_init__(self) -> None:
        for name in ("recoveries", "criteria", "patterns", "models", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"a comparison needs at least one of its {name}, got none")

    @property
    def path(self) -> Path:
        """Where everything goes."""
        return Path(self.directory or f"runs/{self.name}")


@dataclass(frozen=True)
class Cell:
    """One child process: a command of recon's and the directory of what it measures.

    Args:
        title: What progress lines call it.
        command: Arguments of `recon`.
        directory: Its run directory.
    """

    title: str
    command: list[str]
    directory: Path


@dataclass(frozen=True)
class Group:
    """The cells that are compared with each other: one model, criterion, pattern and seed."""

    model: dict[str, Any]
    criterion: str
    pattern: str
    seed: int
    dense: Cell
    pruned: Cell
    recoveries: list[tuple[Entry, Cell]]


def plan(comparison: Comparison, describe: Callable[[type, ClassSpec], str]) -> Iterator[Group]:
    """The groups of a comparison, and in them the commands to run.

    Args:
        comparison: What to compare.
        describe: The name of a criterion or pattern that a class specification makes.
    """
    silent = ["--summary", "false"]
    text = [f"--data={json.dumps(comparison.data)}"] if comparison.data else []
    for model in comparison.models:
        identity = {"model": ModelSource(**model).identity(), "data": comparison.data, "versions": versions()}
        of_model = _options(model, "model")

        def cell(title: str, command: list[str], identity: dict[str, Any] = identity) -> Cell:
            slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            directory = comparison.path / f"{slug}-{digest([command, identity])[:8]}"
            return Cell(title, [*command, "--run_dir", str(directory)], directory)

        named = [option for option in of_model if not option.startswith("--model.name=")]
        dense = cell("dense", ["test", model.get("name", "bundled"), *named, *text, *silent])
        for criterion in comparison.criteria:
            for pattern in comparison.patterns:
                for seed in comparison.seeds:
                    chosen = [f"--criterion={json.dumps(criterion)}", f"--pattern={json.dumps(pattern)}"]
                    common = [*of_model, *text, *chosen, "--seed_everything", str(seed)]
                    pruned = cell("pruned", ["prune", *common, *silent])
                    masks = ["--masks", str(pruned.directory / "masks.safetensors"), "--baselines", "false"]
                    recoveries = []
                    for entry in comparison.recoveries:
                        configs = [arg for name in ["cell", *entry.config] for arg in ("-c", name)]
                        options = _options(comparison.options | entry.options)
                        command = ["fit", *configs, *common, *masks, *options]
                        recoveries.append((entry, cell(entry.label or entry.scope, command)))
                    names = describe(Criterion, criterion), describe(Pattern, pattern)
                    yield Group(model, *names, seed, dense, pruned, recoveries)


def compare(
    comparison: Comparison, describe: Callable[[type, ClassSpec], str], say: Callable[[str], None] = print
) -> Results:
    """Run every cell that has not finished yet, one after another; write `results.json` after each.

    Args:
        comparison: What to compare.
        describe: The name of a criterion or pattern that a class specification makes.
        say: Is told what the cells are doing, in lines.

    Returns:
        All cells; those that failed have `status` "failed" and say why.
    """
    groups = list(plan(comparison, describe))
    cells = {cell.directory: cell for group in groups for cell in _cells(group)}
    results = Results([], name=comparison.name)
    outcomes: dict[Path, Report | str] = {}
    for number, cell in enumerate(cells.values(), 1):
        outcomes[cell.directory] = _outcome(cell, f"[{number}/{len(cells)} {cell.title}]", say)
        results.cells = [report for group in groups for report in _reports(group, outcomes)]
        results.save(comparison.path / "results.json")
    return results


def _cells(group: Group) -> list[Cell]:
    return [group.dense, group.pruned, *(cell for _, cell in group.recoveries)]


def _outcome(cell: Cell, prefix: str, say: Callable[[str], None]) -> Report | str:
    """The report of a cell, found or made now, or why there is none."""
    file = cell.directory / "report.json"
    if not file.exists():
        error = _run(cell, prefix, say)
        if error is not None:
            say(f"{prefix} failed: {error}")
            return error
    return Report.load(file)


def _run(cell: Cell, prefix: str, say: Callable[[str], None]) -> str | None:
    """Run a cell, repeating its lines behind `prefix` and keeping them in its `log.txt`; why it failed, if it did."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    log_file = cell.directory / "log.txt"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "recon", *cell.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                say(f"{prefix} {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
    if status == 0:
        return None
    reason = log_file.read_text().partition(f"recon {cell.command[0]}: error: ")[2]
    return " ".join(reason.split()) or f"exit status {status}, see {log_file}"


def _reports(group: Group, outcomes: dict[Path, Report | str]) -> Iterator[Report]:
    """The rows of a group that are known so far, each with the perplexities that it is compared with."""
    known = {
        "model": group.model.get("name", "bundled"),
        "criterion": group.criterion,
        "pattern": group.pattern,
        "seed": group.seed,
    }
    dense, pruned = (outcomes.get(cell.directory) for cell in (group.dense, group.pruned))
    references = {
        "dense_perplexity": dense.perplexity if isinstance(dense, Report) else None,
        "pruned_perplexity": pruned.perplexity if isinstance(pruned, Report) else None,
    }
    rows = [("dense", None, group.dense), ("pruned", None, group.pruned)]
    rows += [(entry.scope, entry.label, cell) for entry, cell in group.recoveries]
    for scope, label, cell in rows:
        outcome = outcomes.get(cell.directory)
        if isinstance(outcome, str):
            yield Report(
                scope=scope,
                label=label or "",
                status="failed",
                error=outcome,
                run_dir=str(cell.directory),
                **known,
            )
        elif outcome is not None:
            label = label or (outcome.label if scope not in ("dense", "pruned") else "")
            yield replace(outcome, scope=scope, label=label, **known, **references)


def _options(options: dict[str, Any], prefix: str = "") -> list[str]:
    """Command-line options for (dotted) names and values."""
    dotted = f"{prefix}." if prefix else ""
    return [
        f"--{dotted}{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
    ]
