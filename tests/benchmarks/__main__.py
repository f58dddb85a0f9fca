"""What recovery costs: benchmarks whose ratios are measured within one run.

    python -m tests.benchmarks                                all of them, as long as an hour
    python -m tests.benchmarks --quick                        all of them on tiny models: numbers that mean nothing
    python -m tests.benchmarks --only bare_loop depth         some of them
    python -m tests.benchmarks --only flop_rate --device cuda

Run it in the repository's root on a machine that has nothing else to do. Times of anything that is compared are taken
in turn, or one after the other; the ratios hold roughly on other machines.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recon.basics.files import write_json
from recon.experiment.environment import environment

from . import bare_loop, flop_rate, growth, predictions, profiler, quality, stream, window_parallel

Measure = Callable[[Path, argparse.Namespace], dict[str, Any]]

BENCHMARKS: dict[str, tuple[Measure, Callable[[dict[str, Any]], str]]] = {
    "bare_loop": (lambda path, options: bare_loop.measure(path, options.quick), bare_loop.table),
    "quality": (lambda path, options: quality.measure(path, options.quick), quality.table),
    "depth": (lambda path, options: growth.measure("depth", path, options.quick), growth.table),
    "width": (lambda path, options: growth.measure("width", path, options.quick), growth.table),
    "tokens": (lambda path, options: growth.measure("tokens", path, options.quick), growth.table),
    "window_parallel": (
        lambda path, options: window_parallel.measure(path, options.quick, options.threads),
        window_parallel.table,
    ),
    "predictions": (lambda path, options: predictions.measure(path, options.quick), predictions.table),
    "profiler": (lambda path, options: profiler.measure(path, options.quick), profiler.table),
    "stream": (lambda path, options: stream.measure(path, options.quick), stream.table),
    "flop_rate": (lambda path, options: flop_rate.measure(path, options.quick, options.device), flop_rate.table),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print markdown, write JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="which")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, in every process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of flop_rate")
    parser.add_argument("--json", type=Path, help="a file to write, after each benchmark")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    command = " ".join(["python -m tests.benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    record: dict[str, Any] = {"environment": environment(device), "command": command, "seed": 0, "quick": options.quick}
    for name in options.only:
        measure, table = BENCHMARKS[name]
        directory = Path(tempfile.mkdtemp(prefix=f"recon-{name}-"))
        try:
            record[name] = measure(directory, options)
        finally:
            shutil.rmtree(directory)
        print(f"## {name}\n\n{table(record[name])}\n", flush=True)
        if options.json is not None:
            write_json(options.json, record)
    machine = record["environment"]
    print(
        f"`{command}`: {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}, "
        f"seed {record['seed']}"
    )


if __name__ == "__main__":
    main()
