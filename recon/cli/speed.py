"""`recon speed`: whether sparsity pays, in time and bytes, for the matrices of a run's model on this machine."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from recon.basics.files import write_json
from recon.basics.locks import owned
from recon.basics.refusals import UsageError
from recon.basics.run_paths import RunPaths
from recon.cli.arguments import add_device_argument, choose_device, require_seed
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.cli.quiet import quiet
from recon.experiment.speed import SpeedOptions, measure_speed, require_measurable
from recon.report.speed_table import speed_sections
from recon.report.speed_verdict import verdict
from recon.report.table import print_section, table_console


def build_parser() -> ArgumentParser:
    """The parser of `recon speed`."""
    parser = ArgumentParser(
        prog="recon speed",
        exit_on_error=False,
        description="Time products with the pruned matrices of a run's model, one of each shape: dense, as CSR, packed "
        "as bits, and in the 2:4 storage of a GPU that has it. Checks each product first. Writes speed.json.",
    )
    parser.add_argument("run_dir", type=str, help="The directory of the run.")
    parser.add_argument("--tokens", type=list[int], default=[1, 16, 256, 4096], help="Rows of the inputs of a product.")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        default=None,
        help="Precision of weights and inputs; that of the saved model if null.",
    )
    add_device_argument(parser)
    parser.add_argument("--min_seconds", type=float, default=0.5, help="Least time spent on each product.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Decides the inputs.")
    parser.add_argument("--json", type=bool, default=False, help="Print the content of speed.json instead of tables.")
    return parser


def main(args: list[str]) -> int:
    """Parse, measure, write, print.

    Returns:
        The exit status: 0; 1 if a product was not that of the masked matrix.
    """
    quiet()
    with usage():
        config = build_parser().parse_args(arrange("speed", args))
        options = _options(config)
    run = RunPaths(Path(config.run_dir))
    require_measurable(run)  # before a directory is made to be owned
    if config.json:
        logging.getLogger("recon").setLevel(logging.WARNING)  # progress would stand in front of the JSON
    with owned(run.path):
        speed = measure_speed(run, options)
        content = speed.as_dict() | {"verdict": verdict(speed)}
        write_json(run.speed, content, run.manifest.writing)
    if config.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 1 if speed.wrong else 0
    console: Console = table_console()
    for section in speed_sections(speed):
        print_section(section, console)
        console.print()
    console.print(Text(content["verdict"]))
    console.print(Text(f"written to {run.speed}"))
    return 1 if speed.wrong else 0


def _options(config: Any) -> SpeedOptions:
    """The options of the measurement.

    Raises:
        UsageError: If one of them cannot be.
    """
    tokens = tuple(dict.fromkeys(config.tokens))
    if not tokens or min(tokens) < 1:
        raise UsageError(f"--tokens needs whole numbers from 1 on, got {list(tokens)}")
    if not (config.min_seconds > 0 and math.isfinite(config.min_seconds)):
        raise UsageError(f"--min_seconds needs a positive number, got {config.min_seconds}")
    require_seed(config.seed_everything)
    return SpeedOptions(tokens, config.dtype, choose_device(config.device), config.min_seconds, config.seed_everything)
