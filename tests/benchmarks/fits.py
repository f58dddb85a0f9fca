"""`recon fit` as the benchmarks call it: in this process, quietly, and what it left in its run directory."""

import gc
import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L

from recon.cli.fit import main as recon_fit
from recon.experiment.peaks import NOT_FORESEEN
from recon.profiling.entries import SIDES

LEAN = (
    *("--baselines", "false", "--drift", "false", "--summary", "false", "--data.num_test", "1"),
    *("--model.save_dtype", "float32"),  # the bundled model is stored in bf16
)
"""Leaves out what is not recovery, as far as that goes."""


@dataclass(frozen=True)
class Data:
    """What a model is recovered on.

    Args:
        num_sequences: Calibration sequences.
        seq_len: Tokens per sequence.
        num_validation: Held-out sequences.
    """

    num_sequences: int = 128
    seq_len: int = 256
    num_validation: int = 16

    @property
    def data_options(self) -> list[str]:
        """As options of `recon fit`."""
        names = ("num_sequences", "seq_len", "num_validation")
        return [part for name in names for part in (f"--data.{name}", str(getattr(self, name)))]


@dataclass(frozen=True)
class Fit:
    """What one run left behind.

    Args:
        directory: The run's.
        report: Its `report.json`.
        memory: Its `memory.json`.
        cpu_seconds: Of this process, all threads, in the fit; None if another process made it.
    """

    directory: Path
    report: dict[str, Any]
    memory: dict[str, Any]
    cpu_seconds: float | None = None

    @classmethod
    def read(cls, directory: Path, cpu_seconds: float | None = None) -> "Fit":
        """The run in `directory`."""
        report, memory = (json.loads((directory / name).read_text()) for name in ("report.json", "memory.json"))
        return cls(directory, report, memory, cpu_seconds)

    @property
    def seconds(self) -> float:
        """Of the fit, the exact start included; loading, pruning, saving and evaluation are not in it."""
        return self.report["seconds"]


def arguments(scope: str, directory: Path, *options: str) -> list[str]:
    """Arguments of `recon fit` for one scope."""
    return ["-c", f"scopes/{scope}", *LEAN, *options, "--run_dir", str(directory)]


def fit(scope: str, directory: Path, *options: str) -> Fit:
    """Run `recon fit` with all its callbacks; their lines go nowhere."""
    gc.collect()  # a model is in cycles, and would be live in what is measured
    gc.freeze()  # nor does what else this process holds count
    with redirect_stdout(io.StringIO()), _timed_fit() as cpu_seconds:
        recon_fit(arguments(scope, directory, *options))
    return Fit.read(directory, sum(cpu_seconds))


@contextmanager
def _timed_fit() -> Iterator[list[float]]:
    """Note the CPU seconds of each `Trainer.fit` inside: work of other processes disturbs them less."""
    seconds: list[float] = []
    trainer_fit = L.Trainer.fit

    def timed(*args: Any, **options: Any) -> None:
        started = time.process_time()
        trainer_fit(*args, **options)
        seconds.append(time.process_time() - started)

    with mock.patch.object(L.Trainer, "fit", timed):
        yield seconds


def peak_bytes(run: Fit) -> dict[str, int | None]:
    """The largest live tensor bytes in the phases of the fit, on the device's side and on the host's.

    None where the report does not have them by category.
    """
    tracked = run.report["ranks"][0]["tracked"]
    return {f"{side}_bytes": sum(tracked.get(side, {}).values()) or None for side in SIDES}


def of_the_fit(memory: dict[str, Any]) -> list[dict[str, Any]]:
    """The phases of `memory.json` in which the model is recovered."""
    return [phase for phase in memory["phases"] if phase["phase"] not in NOT_FORESEEN]


def say(message: str) -> None:
    """Progress, apart from the tables."""
    print(message, file=sys.stderr, flush=True)
