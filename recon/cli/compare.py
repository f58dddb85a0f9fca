"""`recon compare`: compare scopes, criteria, patterns and seeds, and draw what each buys and costs."""

import sys
from contextlib import nullcontext
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from recon.basics.refusals import UsageError
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.cli.quiet import quiet
from recon.cli.resolver import CommandResolver
from recon.cli.screen import screen
from recon.cli.tasks import TASK_OPTIONS, add_task_arguments, tasks_of
from recon.experiment.comparison.cluster import Cluster
from recon.experiment.comparison.compare import compare
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.jobs import Jobs, require_slurm
from recon.experiment.comparison.pool import Pool, Processes
from recon.experiment.comparison.spec import Comparison, Text
from recon.experiment.comparison.workers import require_threads, workers_of
from recon.report import draw_across, draw_drift, draw_page, draw_pareto, log_pictures, print_table, table_console

OWN = ("config", "workers", "threads", "warm", "cluster", "verbose")
"""Options of the command that are none of the comparison's."""


def build_parser() -> ArgumentParser:
    """The parser of `recon compare`."""
    parser = ArgumentParser(
        prog="recon compare", exit_on_error=False, description="Compare scopes, criteria, patterns and seeds."
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file or name of a shipped comparison.")
    parser.add_class_arguments(Comparison, skip={"tasks"})
    add_task_arguments(parser)
    parser.add_argument(
        "--workers",
        type=int | Literal["gpus", "slurm"],
        default=1,
        help="Cells at a time; `gpus` for one on each visible GPU, `slurm` for one in each job of a SLURM cluster.",
    )
    parser.add_argument(
        "--threads",
        type=int | None,
        default=None,
        help="CPU threads of each cell; several workers share the cores evenly by default.",
    )
    parser.add_argument(
        "--warm",
        type=bool,
        default=False,
        help="Fork cells from a process that has imported recon: seconds less for each, and host peaks without the "
        "libraries that they share with it (Linux).",
    )
    parser.add_class_arguments(Cluster, "cluster")
    parser.add_argument("--verbose", type=bool, default=False, help="Add tables of memory, predictions and drift.")
    return parser


def parsed(args: list[str]) -> tuple[Namespace, Comparison]:
    """The options of the command, and the comparison; classes in the options of its cells stay as they were written.

    Raises:
        UsageError: If they cannot be understood.
    """
    with usage():
        config = build_parser().parse_args(arrange("compare", args))
        options = {name: value for name, value in config.as_dict().items() if name not in (*OWN, *TASK_OPTIONS)}
        built: dict[str, Any] = {
            "recoveries": [Entry(**entry) for entry in options["recoveries"]],
            "texts": [Text(**text) for text in options["texts"]],
            "tasks": tasks_of(config),
        }
        return config, Comparison(**options | built)


def pool_of(config: Namespace, comparison: Comparison) -> tuple[Pool, CommandResolver]:
    """What runs the cells, and what reads their commands for it.

    Raises:
        UsageError: If this machine has no such workers or cannot fork, a number is too small, or budgets are the
            seconds of this machine.
    """
    if config.warm and (config.workers == "slurm" or sys.platform != "linux"):
        raise UsageError("--warm true needs cells on this machine, and Linux; leave it out")
    if config.workers != "slurm":
        return Processes(workers_of(config.workers, config.threads), config.warm), CommandResolver(comparison.path)
    require_threads(config.threads)
    with usage():
        cluster = Cluster(**config.cluster.as_dict())
    require_slurm()
    if comparison.match == "seconds":
        raise UsageError(
            "--match seconds needs the speed of the machine that runs the cells, got --workers slurm, whose nodes are "
            "not measured; give --match flops"
        )
    return Jobs(cluster, comparison.path, config.threads), CommandResolver(comparison.path, cluster.gpus_per_process)


def main(args: list[str]) -> int:
    """Parse, run the cells, print the table, draw the pictures."""
    quiet()
    config, comparison = parsed(args)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    pool, resolver = pool_of(config, comparison)
    is_live = console.is_terminal and not console.is_dumb_terminal and config.workers != 1
    with screen(console) if is_live else nullcontext():
        results = compare(comparison, resolver, pool)
    print_table(results, table_console(), config.verbose)
    pictures = [file for draw in (draw_across, draw_pareto, draw_drift) for file in draw(results, comparison.path)]
    log_pictures(pictures, comparison.path / "pictures")
    for file in [comparison.path / "results.json", *pictures, *draw_page(results, comparison.path)]:
        console.print(str(file))
    console.print(f"TensorBoard: tensorboard --logdir {comparison.path}")
    failed = [cell for cell in results.cells if cell.status == "failed"]
    if failed:
        console.print(f"{len(failed)} of {len(results.cells)} cells failed; the same command tries them again")
    return 1 if failed else 0
