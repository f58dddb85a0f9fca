"""`recon prune`: choose the weights that survive, write their masks, measure the pruned model."""

import json
import shlex
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from recon.basics.digests import digest
from recon.basics.locks import owned
from recon.cli.arguments import (
    add_data_arguments,
    add_device_argument,
    add_offload_argument,
    add_pruning_arguments,
    add_summary_arguments,
    choose_device,
    parse,
    plain_data,
)
from recon.cli.names import CHOICES, with_short_paths
from recon.cli.quiet import quiet
from recon.cli.tasks import TASK_OPTIONS, add_task_arguments, identity_of_tasks, suite_of
from recon.experiment.baselines import measure_pruned
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.experiment.options import RunOptions
from recon.models.loading import ModelSource
from recon.pruning.refinement import refined
from recon.report import Results, print_table, table_console, with_references
from recon.report.log import log_to


def build_parser() -> ArgumentParser:
    """The parser of `recon prune`."""
    parser = ArgumentParser(
        prog="recon prune", exit_on_error=False, description="Choose the weights that survive and write their masks."
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file or name of a shipped configuration.")
    parser.add_argument(
        "--run_dir", type=str | None, default=None, help="Where to write; runs/prune-<fingerprint> if null."
    )
    parser.add_argument("--seed_everything", type=int, default=0, help="Chooses the calibration sequences.")
    add_device_argument(parser)
    parser.add_argument(
        "--save_model", type=bool, default=False, help="Write the pruned model too, in Hugging Face format."
    )
    parser.add_argument("--baselines", type=bool, default=True, help="Measure the dense model's perplexity too.")
    parser.add_argument(
        "--drift",
        type=bool,
        default=True,
        help="Measure on the validation split how far hidden states and predictions are from the dense model's.",
    )
    add_task_arguments(parser)
    add_summary_arguments(parser)
    parser.add_class_arguments(ModelSource, "model", instantiate=False)
    add_offload_argument(parser)
    add_data_arguments(parser)
    add_pruning_arguments(parser)
    parser.link_arguments("seed_everything", "data.init_args.seed")
    return parser


def main(args: list[str]) -> int:
    """Parse, prune, evaluate, report."""
    quiet()
    parser = build_parser()
    config, built = parse(parser, args)
    criterion = refined(built.criterion, built.refinement)
    if criterion is None or built.pattern is None:
        raise ValueError("recon prune needs a criterion and a pattern, got null for one of them; name both")
    options = {
        key: value
        for key, value in config.as_dict().items()
        if key not in ("config", "run_dir", "device", "drift", "baselines", "summary", "verbose", *TASK_OPTIONS)
    }
    options["data"] = plain_data(options["data"])
    offload = options["model"].pop("offload")
    device = choose_device(config.device)
    source = ModelSource(**options["model"]).on(device)
    identity = {"model": source.identity(), "data": built.data.identity(), **identity_of_tasks(config)}
    fingerprint = {"options": with_short_paths(options), "versions": versions(), **identity}
    path = Path(config.run_dir or f"runs/prune-{digest(fingerprint)[:8]}")
    console = Console(highlight=False, soft_wrap=True)
    measured = {"drift": config.drift, "baselines": config.baselines, "suite": suite_of(config)}
    chosen = RunOptions(criterion, built.pattern, built.pruning, **measured)
    begin(built.data)
    with owned(path):
        run = RunDirectory(path, fingerprint)
        run.sweep()
        with log_to(run.log):
            report = measure_pruned(source, built.data, run, chosen, device, config.save_model, offload)
    if config.summary:
        print_table(Results(with_references(report)), table_console(), config.verbose)
    moved = run.moved.is_file()
    console.print(f"masks in {run.masks}" + (f", moved weights in {run.moved}" if moved else ""))
    given = [*differing(config, parser.get_defaults()), "--masks", str(run.masks)]
    given += ["--model.start", "moved"] if moved else []
    console.print(f"recover with: recon fit -c scopes/submodule {shlex.join(given)}")
    return 0


def differing(config: Any, defaults: Any) -> list[str]:
    """The options of model, data and seed that differ from their defaults, as `recon fit` takes them."""
    found = [] if config.seed_everything == 0 else ["--seed_everything", str(config.seed_everything)]
    found += _options("model", {**config.model.as_dict(), "seed": None}, defaults.model.as_dict() | {"seed": None})
    data, usual = config.data.as_dict(), defaults.data.as_dict()["init_args"]
    if data["class_path"] != defaults.data.class_path:
        found, usual = [*found, "--data", data["class_path"]], {}
    return found + _options("data", {**data["init_args"], "seed": None}, usual | {"seed": None})


def _options(name: str, value: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """The options below `name` whose values are not the usual ones."""
    found: list[str] = []
    for key, item in value.items():
        option = f"{name}.{key}"
        if item == usual.get(key):
            continue
        if option in CHOICES and isinstance(item, dict):
            kind = item["class_path"].removeprefix(f"{CHOICES[option].face}.")
            found += [f"--{option}", kind, *_options(option, item.get("init_args", {}), {})]
        elif item is not None or key in usual:
            found += [f"--{option}", item if isinstance(item, str) else json.dumps(item)]
    return found
