"""Two processes that recover windows of their own, against one with as many threads as each of them.

Both are the command as a user gives it, in processes of their own; both take the masks of one file, so that nothing
but recovery differs. The seconds of the fit are those of its report: in two processes they go on until the last one
has its windows written and the first has taken them in. The whole command adds imports (ten seconds, in both
processes at once), loading, saving and evaluation, which do not get faster.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .bare_loop import QUICK, Size
from .fits import Fit, arguments, fit, say

SCOPES = ("submodule", "block", "matrix")
ROOT = Path(__file__).parents[2]

Run = Callable[[list[str], int, int], None]
"""Arguments of `recon fit`, processes, threads of each."""


def command(args: list[str], processes: int, threads: int) -> None:
    """Run `recon fit` in processes of its own.

    Raises:
        RuntimeError: If it fails, with what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, "-m", "recon", "fit", *args]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"recon fit {' '.join(args)} failed:\n{done.stdout}\n{done.stderr}")


def measure(
    directory: Path, quick: bool = False, threads: int = 1, scopes: tuple[str, ...] = SCOPES, run: Run = command
) -> dict[str, Any]:
    """Seconds of both and their ratio, per scope.

    Args:
        directory: Where the runs go.
        quick: Few short sequences.
        threads: Of each process.
        scopes: Which.
        run: How `recon fit` is run.
    """
    size = QUICK if quick else Size(epochs=4)  # half a minute: what each process does once counts less
    made = fit("matrix", directory / "masks", *size.data_options, "--trainer.accelerator", "cpu")
    masks = made.directory / "masks.safetensors"
    rows = []
    for scope in scopes:
        epochs = [] if scope == "matrix" else ["--model.epochs", str(size.epochs)]
        options = [*size.data_options, *epochs, "--masks", str(masks), "--trainer.accelerator", "cpu"]
        row: dict[str, Any] = {"scope": scope}
        weights = {}
        for processes, strategy in ((1, "auto"), (2, "window_parallel")):
            target = directory / f"{scope}-{processes}"
            parallel = ["--trainer.strategy", strategy, "--trainer.devices", str(processes)]
            started = time.perf_counter()
            run(arguments(scope, target, *options, *parallel), processes, threads)
            row[f"command_seconds_{processes}"] = time.perf_counter() - started
            row[f"fit_seconds_{processes}"] = Fit.read(target).seconds
            weights[processes] = load_file(target / "model" / "model.safetensors")
            say(f"window_parallel: {scope}, {processes} processes: {row[f'fit_seconds_{processes}']:.2f} s")
        row["speedup"] = row["fit_seconds_1"] / row["fit_seconds_2"]
        row["command_speedup"] = row["command_seconds_1"] / row["command_seconds_2"]
        one, two = weights[1], weights[2]
        row["same_weights"] = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        rows.append(row)
    return {"goal": 1.7, "size": vars(size), "threads_each": threads, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per scope."""
    lines = [
        "| scope | fit, 1 process, s | 2 processes, s | times as fast | whole command, s | 2 processes, s | "
        "times as fast | same bits |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in result["rows"]:
        cells = []
        for name, speedup in (("fit", "speedup"), ("command", "command_speedup")):
            cells += [f"{row[f'{name}_seconds_{processes}']:.2f}" for processes in (1, 2)] + [f"{row[speedup]:.2f}"]
        lines.append(f"| {row['scope']} | {' | '.join(cells)} | {'yes' if row['same_weights'] else 'NO'} |")
    return "\n".join([*lines, "", f"Goal: {result['goal']} times as fast, {result['threads_each']} thread each."])
