"""`recon prune`: choose the weights that survive, write their masks, measure the pruned model."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from recon.cli.arguments import add_pruning_arguments, choose_device, parse
from recon.cli.quiet import quiet
from recon.data import TokenData
from recon.experiment.baselines import measure_pruned
from recon.experiment.directory import RunDirectory, digest
from recon.experiment.environment import versions
from recon.models.loading import ModelSource
from recon.pruning.start_weights import MOVED
from recon.report import Results, print_table, table_console, with_references
from recon.report.log import LOG, log_to


def main(args: list[str]) -> int:
    """Parse, prune, evaluate, report."""
    quiet()
    parser = ArgumentParser(
        prog="recon prune", exit_on_error=False, description="Choose the weights that survive and write their masks."
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file or name of a shipped configuration.")
    parser.add_argument(
        "--run_dir", type=str | None, default=None, help="Where to write; runs/prune-<fingerprint> if null."
    )
    parser.add_argument("--seed_everything", type=int, default=0, help="Chooses the calibration sequences.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
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
    parser.add_argument("--summary", type=bool, default=True, help="Print the report as a table in the end.")
    parser.add_argument("--verbose", action="store_true", help="Add tables of memory, predictions and drift.")
    parser.add_class_arguments(ModelSource, "model", instantiate=False)
    parser.add_class_arguments(TokenData, "data")
    add_pruning_arguments(parser)
    parser.link_arguments("seed_everything", "data.seed")
    config, built = parse(parser, args)
    if built.criterion is None or built.pattern is None:
        raise ValueError("recon prune needs a criterion and a pattern, got null")
    options = {
        key: value
        for key, value in config.as_dict().items()
        if key not in ("config", "run_dir", "device", "drift", "baselines", "summary", "verbose")
    }
    source = ModelSource(**config.model.as_dict())
    identity = {"model": source.identity(), "data": built.data.source.identity()}
    fingerprint = {"options": options, "versions": versions(), **identity}
    run = RunDirectory(Path(config.run_dir or f"runs/prune-{digest(fingerprint)[:8]}"), fingerprint)
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line)
        logging.getLogger("recon").info(line)

    report = log_to(run.path / LOG)(measure_pruned)(
        source,
        built.data,
        built.criterion,
        built.pattern,
        built.pruning,
        run,
        choose_device(config.device),
        config.save_model,
        config.drift,
        say,
        config.baselines,
    )
    if config.summary:
        print_table(Results(with_references(report)), table_console(), config.verbose)
    moved = f", moved weights in {run.path / MOVED}" if built.criterion.moves_weights else ""
    console.print(f"masks in {run.masks}{moved}; recover with:")
    same = _same(config, parser, built.criterion.moves_weights)
    console.print(f"  recon fit -c scopes/submodule {shlex.join([*same, f'--masks={run.masks}'])}")
    return 0


def _same(config: Any, parser: ArgumentParser, moves_weights: bool) -> list[str]:
    """Options of `recon fit` that recover this very model, on the same data, from the weights that pruning left."""
    defaults = parser.get_defaults()
    names = [f"{part}.{name}" for part in ("model", "data") for name in config[part].as_dict()]
    names = [name for name in names if name not in ("model.seed", "data.seed")]  # `recon fit` has the one below
    options = {name: config[name] for name in ("seed_everything", *names) if config[name] != defaults.get(name)}
    if moves_weights:
        options["model.start"] = "moved"
    return [f"--{name}={_text(value)}" for name, value in options.items()]


def _text(value: Any) -> str:
    value = value.as_dict() if hasattr(value, "as_dict") else value
    return value if isinstance(value, str) else json.dumps(value)
