"""`recon prune`: choose which weights survive, write their masks, measure what that costs."""

from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from recon.cli.arguments import add_data_arguments, add_pruning_arguments, choose_device, parse, plain_data
from recon.cli.quiet import quiet
from recon.experiment.baselines import measure_pruned
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory, digest
from recon.experiment.environment import versions
from recon.models.loading import ModelSource
from recon.pruning.start_weights import MOVED
from recon.report import Results, print_table


def main(args: list[str]) -> int:
    """Parse, prune, evaluate, report."""
    quiet()
    parser = ArgumentParser(
        prog="recon prune", exit_on_error=False, description="Choose which weights survive and write their masks."
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
    parser.add_argument(
        "--drift",
        type=bool,
        default=True,
        help="Measure on the validation split how far hidden states and predictions are from the dense model's.",
    )
    parser.add_argument("--summary", type=bool, default=True, help="Print the report as a table in the end.")
    parser.add_class_arguments(ModelSource, "model", instantiate=False)
    add_data_arguments(parser)
    add_pruning_arguments(parser)
    parser.link_arguments("seed_everything", "data.init_args.seed")
    config, built = parse(parser, args)
    if built.criterion is None or built.pattern is None:
        raise ValueError("recon prune needs a criterion and a pattern, got null")
    options = {
        key: value
        for key, value in config.as_dict().items()
        if key not in ("config", "run_dir", "device", "drift", "summary")
    }
    options["data"] = plain_data(options["data"])
    source = ModelSource(**config.model.as_dict())
    identity = {"model": source.identity(), "data": built.data.identity()}
    fingerprint = {"options": options, "versions": versions(), **identity}
    run = RunDirectory(Path(config.run_dir or f"runs/prune-{digest(fingerprint)[:8]}"), fingerprint)
    console = Console(highlight=False, soft_wrap=True)
    begin(built.data)
    report = measure_pruned(
        source,
        built.data,
        built.criterion,
        built.pattern,
        built.pruning,
        run,
        choose_device(config.device),
        config.save_model,
        config.drift,
        console.print,
    )
    if config.summary:
        print_table(Results([report]), console)
    moved = f", moved weights in {run.path / MOVED}" if built.criterion.moves_weights else ""
    console.print(f"masks in {run.masks}{moved}; recover with: recon fit -c scopes/submodule --masks {run.masks}")
    return 0
