"""`recon test`: the perplexity of any model or run, and its scores on tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from recon.basics.files import read_json
from recon.basics.locks import owned
from recon.basics.manifest import require_unchanged
from recon.basics.run_paths import RunPaths
from recon.cli.arguments import (
    DEFAULT_DATA,
    add_data_arguments,
    add_device_argument,
    add_offload_argument,
    choose_device,
    parse,
    plain_data,
)
from recon.cli.arrange import arrange
from recon.cli.configs import load_options
from recon.cli.errors import usage
from recon.cli.quiet import quiet
from recon.cli.tasks import add_task_arguments, identity_of_tasks, suite_of
from recon.data import TokenData
from recon.experiment.baselines import measure
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.pruning.prune import moved_with
from recon.pruning.whole_slices import without_removed
from recon.report import Report, Results, print_table, table_console, with_references

FINGERPRINT, CONFIG, REPORT, MASKS, MODEL = (
    "fingerprint.json",
    "config.yaml",
    "report.json",
    "masks.safetensors",
    "model",
)
"""Files and the directory of a run."""


@dataclass(frozen=True)
class Subject:
    """The model to test.

    Args:
        run: The directory of the run that made it; None for a model that is no run's.
        model: Its directory, hub name or `bundled`; None for a run that wrote none, whose source is tested under masks.
    """

    run: Path | None
    model: str | None

    @classmethod
    def of(cls, name: str) -> "Subject":
        """The model, the run, or the model within a run that `name` means.

        Raises:
            ValueError: If it is a run with neither model nor masks.
        """
        path = Path(name)
        if path.name == MODEL and (path.parent / FINGERPRINT).is_file():
            return cls(path.parent, name)
        if not (path / FINGERPRINT).is_file():
            return cls(None, name)
        if (path / MODEL).is_dir():
            return cls(path, str(path / MODEL))
        if (path / MASKS).is_file():
            return cls(path, None)
        raise ValueError(
            f"recon test needs a model or a run with model or masks, got {path}, which has none of them; name the "
            f"model's directory, or let the run end"
        )

    def require_unchanged(self) -> None:
        """Refuse a run whose files are not as recon wrote them.

        Raises:
            ValueError: Naming the first such file.
        """
        if self.run is None:
            return
        run = RunPaths(self.run)
        model = None if self.model is None else Path(self.model)
        named = [
            run.fingerprint_file,
            run.config,
            run.masks,
            run.report,
            run.text,
            *([run.moved] if model is None else [model]),
        ]
        for path in named:
            if path.exists() or run.manifest.records(path):
                run.manifest.require(path, "copy it again, or repeat the command of the run")

    def options(self) -> dict[str, Any]:
        """The options of the run, as its fingerprint has them; none without a run."""
        if self.run is None:
            return {}
        file, cure = self.run / FINGERPRINT, "test its model/ directory by itself, or run again in a new run_dir"
        options = read_json(file, dict, "recon test", cure).get("options")
        if not isinstance(options, dict) or "model" not in options:
            raise ValueError(f"recon test needs the options of a run, got {file} without options.model; {cure}")
        return options

    def source(self, options: Mapping[str, Any]) -> ModelSource:
        """Where to load the model from.

        Args:
            options: Of the model, as given on the command line; a run's source has those of the run instead.
        """
        return ModelSource(self.model, **options) if self.model is not None else self.dense()

    def dense(self) -> ModelSource:
        """The dense model of the run.

        Raises:
            ValueError: If the model is no run's.
        """
        if self.run is None:
            raise ValueError(
                f"--baselines needs a run, whose dense model is known, got {self.model}; leave it out, and test the "
                f"dense model by itself"
            )
        held = self.options()["model"]
        held = held.get("init_args", held)
        return ModelSource(**{name: held[name] for name in ModelSource.__dataclass_fields__ if name in held})


def build_parser() -> ArgumentParser:
    """The parser of `recon test`."""
    parser = ArgumentParser(
        prog="recon test", exit_on_error=False, description="Measure a model or run: perplexity, and --tasks."
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file or name of a shipped configuration.")
    parser.add_argument("path", type=str, help="A run directory, a model directory, a hub name, or `bundled`.")
    parser.add_argument("--run_dir", type=str | None, default=None, help="Where to write report.json; nowhere if null.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Reported; test sequences do not depend on it.")
    add_device_argument(parser)
    parser.add_argument("--masks", type=str | None, default=None, help="Masks to apply first.")
    parser.add_argument(
        "--baselines", type=bool, default=False, help="Measure the dense model of a run too, and the distance to it."
    )
    parser.add_class_arguments(ModelSource, "model", skip={"name"}, instantiate=False)
    add_offload_argument(parser)
    add_task_arguments(parser)
    parser.add_argument("--summary", type=bool, default=True, help="Print the report as a table.")
    parser.add_argument("--verbose", type=bool, default=False, help="Add tables of memory, predictions and drift.")
    add_data_arguments(parser, skip={"seed"})
    return parser


def main(args: list[str]) -> int:
    """Parse, evaluate, report."""
    quiet()
    parser = build_parser()
    with usage():
        subject = Subject.of(parser.parse_args(arrange("test", args)).path)
    subject.require_unchanged()
    with usage():
        parser.set_defaults(data_of_run(subject))
    config, built = parse(parser, args)
    if config.baselines:
        with usage():
            subject.dense()
    source = subject.source({name: one for name, one in config.model.as_dict().items() if name != "offload"})
    device = choose_device(config.device)
    source = source.on(device)
    begin(built.data)
    if config.run_dir is None:
        report = _measured(subject, source, built.data, config, device)
    else:
        options = {"data": plain_data(config.data.as_dict()), "device": config.device, "masks": config.masks}
        options |= {"baselines": True} if config.baselines else {}
        identity = {"model": source.identity(), "text": built.data.identity(), **identity_of_tasks(config)}
        with owned(Path(config.run_dir)):
            run = RunDirectory(Path(config.run_dir), {**options, **identity, "versions": versions()})
            report = _measured(subject, source, built.data, config, device, run)
            report.replace(run_dir=str(run.path)).save(run.report, run.manifest.writing)
            run.clean()
    console = Console(highlight=False, soft_wrap=True)
    if config.summary:
        print_table(Results(with_references(report)), table_console(), config.verbose)
    console.print("  ".join(f"{key.replace('_', ' ')}: {value}" for key, value in report.protocol.items()))
    return 0


def _measured(
    subject: Subject,
    source: ModelSource,
    data: TokenData,
    config: Any,
    device: torch.device,
    run: RunDirectory | None = None,
) -> Report:
    """The report of the model: under its run's masks if the run wrote no model, and named as the run is."""
    file = subject.run and subject.run / MASKS
    masks, promised, moved = None, None, None
    if config.masks is not None:
        require_unchanged(Path(config.masks), "copy it again, or prune again")
        masks = Masks.load(config.masks)
    elif file is not None and file.is_file():
        if subject.model is None:
            masks = Masks.load(file)
            moved = moved_with(file, masks)
        else:
            promised = without_removed(Masks.load(file))  # removed experts are not in its model
    suite = suite_of(config)
    report = measure(source, data, device, masks, promised, moved, config.model.offload, suite, run)
    if subject.run is not None and config.masks is None and (subject.run / REPORT).is_file():
        report = _named(report, Report.load(subject.run / REPORT), recovered=subject.model is not None)
    if config.baselines:
        dense = measure(subject.dense().on(device), data, device, offload=config.model.offload, suite=suite)
        of_dense = {"sparsity": dense.sparsity, "model_sparsity": dense.model_sparsity, "tasks": dense.tasks}
        return report.replace(dense_perplexity=dense.perplexity, references=report.references | {"dense": of_dense})
    return report


def _named(report: Report, held: Report, recovered: bool) -> Report:
    """`report`, named as the run that `held` is of; compared with its references if they were measured alike."""
    alike = held.protocol == report.protocol
    return report.replace(
        scope=held.scope if recovered else report.scope,
        label=held.label if recovered else report.label,
        model=held.model,
        criterion=held.criterion,
        pattern=held.pattern,
        dense_perplexity=held.dense_perplexity if alike else None,
        pruned_perplexity=held.pruned_perplexity if alike else None,
        references=held.references if alike else {},
    )


def data_of_run(subject: Subject) -> dict[str, Any]:
    """The data options of a run, as defaults: a run is tested on the split it was made for."""
    if subject.run is None:
        return {}
    file = subject.run / CONFIG
    options = load_options(file, ["data"]) if file.is_file() else subject.options()
    data = options.get("data", {})
    spec: dict[str, Any] = data if "class_path" in data else {**DEFAULT_DATA, "init_args": data}
    return {"data": spec | {"init_args": {key: one for key, one in spec["init_args"].items() if key != "seed"}}}
