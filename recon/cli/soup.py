"""`recon soup`: the average of several recoveries under one mask, as a run of its own."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from recon.basics.digests import digest
from recon.basics.locks import owned
from recon.cli.arguments import (
    add_data_arguments,
    add_device_argument,
    add_offload_argument,
    add_summary_arguments,
    choose_device,
    parse,
    plain_data,
)
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.cli.quiet import quiet
from recon.cli.test import Subject, data_of_run
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.experiment.opened import Opener
from recon.experiment.origin import Origin
from recon.experiment.soup import NAME, MeasuredSplit, PerplexityMeter, require_alike, soup
from recon.report import Results, print_table, table_console, with_references
from recon.report.log import log_to


def build_parser() -> ArgumentParser:
    """The parser of `recon soup`."""
    parser = ArgumentParser(
        prog="recon soup", exit_on_error=False, description="Average recoveries of one model under one mask."
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file or name of a shipped configuration.")
    parser.add_argument("paths", type=str, nargs="+", help="Directories of finished runs under one mask.")
    parser.add_argument(
        "--weights",
        type=Literal["uniform", "greedy"],
        default="uniform",
        help="Average all runs, or the best and each that makes it no worse on the validation split.",
    )
    parser.add_argument(
        "--run_dir", type=str | None, default=None, help="Where to write; runs/soup-<fingerprint> if null."
    )
    add_device_argument(parser)
    parser.add_argument(
        "--evaluate_on",
        type=Literal["test", "validation"] | None,
        default=None,
        help="The split that perplexity is measured on; that of the first run if null.",
    )
    add_offload_argument(parser)
    add_summary_arguments(parser)
    add_data_arguments(parser, skip={"seed"})
    return parser


def main(args: list[str]) -> int:
    """Parse, average, evaluate, report."""
    quiet()
    parser = build_parser()
    with usage():
        given = parser.parse_args(arrange("soup", args))
    origins = [Origin(Path(path), NAME) for path in given.paths]
    require_alike(origins)
    first = Subject(origins[0].path, None)
    with usage():
        parser.set_defaults(data_of_run(first))
    config, built = parse(parser, args)
    data, device = built.data, choose_device(config.device)
    source = first.source({}).on(device)
    split: MeasuredSplit = config.evaluate_on or origins[0].report().protocol["split"]
    begin(data)
    fingerprint = _fingerprint(config, first, origins, split) | {"data": data.identity()}
    path = Path(config.run_dir or f"runs/soup-{digest(fingerprint)[:8]}")
    with owned(path):
        run = RunDirectory(path, fingerprint)
        run.sweep()
        with log_to(run.log):
            opened = Opener(config.model.offload, device, dense=run.dense)
            report = soup(origins, config.weights, PerplexityMeter(source, data, opened), run, split)
    if config.summary:
        print_table(Results(with_references(report)), table_console(), config.verbose)
    Console(highlight=False, soft_wrap=True).print(f"run directory {path}: model/, report.json")
    return 0


def _fingerprint(config: Any, first: Subject, origins: list[Origin], split: str) -> dict[str, Any]:
    """The identity of a soup: the weights of its runs, their dense model, and the text that it is measured on."""
    options = {
        "model": first.options()["model"],
        "data": plain_data(config.data.as_dict()),
        "weights": config.weights,
        "evaluate_on": split,
    }
    known = {"options": options, "versions": versions(), "model": dict(origins[0].dense())}
    return known | {"soup": [origin.identity() for origin in origins]}
