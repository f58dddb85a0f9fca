"""`recon test`: the perplexity of any model or run directory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from recon.cli.arguments import DEFAULT_DATA, add_data_arguments, choose_device, parse, plain_data
from recon.cli.configs import resolve_config_names
from recon.cli.quiet import quiet
from recon.experiment.baselines import measure
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.report import Report, Results, print_table


def main(args: list[str]) -> int:
    """Parse, evaluate, report."""
    quiet()
    parser = ArgumentParser(
        prog="recon test", exit_on_error=False, description="Measure the perplexity of a model or run directory."
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file or name of a shipped configuration.")
    parser.add_argument("path", type=str, help="A run directory, a model directory, a hub name, or `bundled`.")
    parser.add_argument("--run_dir", type=str | None, default=None, help="Where to write report.json; nowhere if null.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Reported; test sequences do not depend on it.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument("--masks", type=str | None, default=None, help="Masks to apply first.")
    parser.add_class_arguments(ModelSource, "model", skip={"name"}, instantiate=False)
    parser.add_argument("--summary", type=bool, default=True, help="Print the report as a table.")
    add_data_arguments(parser, skip={"seed"})
    parser.set_defaults(_data_of_run(Path(parser.parse_args(resolve_config_names(args)).path)))
    config, built = parse(parser, args)
    path = Path(config.path)
    name = str(path / "model") if (path / "model").is_dir() else config.path
    source = ModelSource(name=name, **config.model.as_dict())
    run = None
    if config.run_dir is not None:
        options = {"data": plain_data(config.data.as_dict()), "device": config.device, "masks": config.masks}
        identity = {"model": source.identity(), "text": built.data.identity()}
        run = RunDirectory(Path(config.run_dir), {**options, **identity, "versions": versions()})
    masks = None if config.masks is None else Masks.load(config.masks)
    of_run = path / "masks.safetensors"
    promised = Masks.load(of_run) if of_run.is_file() and (path / "model").is_dir() else None
    begin(built.data)
    report = measure(source, built.data, choose_device(config.device), masks, promised)
    if (path / "report.json").is_file():
        report = _of_run(report, path)
    if run is not None:
        replace(report, run_dir=str(run.path)).save(run.report)
    console = Console(highlight=False, soft_wrap=True)
    if config.summary:
        print_table(Results([report]), console)
    console.print("  ".join(f"{key.replace('_', ' ')}: {value}" for key, value in report.protocol.items()))
    return 0


def _of_run(report: Report, path: Path) -> Report:
    """`report`, named as the run in `path` is; compared with its references if they were measured alike."""
    held = Report.load(path / "report.json")
    alike = held.protocol == report.protocol
    return replace(
        report,
        scope=held.scope,
        label=held.label,
        model=held.model,
        criterion=held.criterion,
        pattern=held.pattern,
        dense_perplexity=held.dense_perplexity if alike else None,
        pruned_perplexity=held.pruned_perplexity if alike else None,
    )


def _data_of_run(path: Path) -> dict[str, Any]:
    """The data options of a run directory, as defaults: a run is tested on the split it was made for."""
    file = path / "config.yaml"
    if not file.is_file():
        return {}
    data = yaml.safe_load(file.read_text()).get("data", {})
    spec: dict[str, Any] = data if "class_path" in data else {**DEFAULT_DATA, "init_args": data}
    return {"data": spec | {"init_args": {key: one for key, one in spec["init_args"].items() if key != "seed"}}}
