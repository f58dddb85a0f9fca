"""The phases of a run and their names, announced to listeners that measure them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

CPU = torch.device("cpu")

WINDOW = "window "
"""Prefix of the phases in which a window is recovered; the window's name follows."""


class PhaseName(StrEnum):
    """Names of the phases but those of windows, as in `memory.json`, in the order of a run."""

    LOAD = "load"
    PRUNE = "prune"
    BASELINES = "evaluate dense and pruned"
    PREPARE = "prepare"
    START = "start"
    TRAIN = "train"
    EMBED = "embed"
    SEARCH = "search"
    WAIT = "wait"
    SAVE = "save"
    EVALUATE = "evaluate"
    DRIFT = "drift"


def window_phase(window: str) -> str:
    """Name the phase in which the window of this name is recovered."""
    return WINDOW + window


def is_window(phase: str) -> bool:
    """Whether a window is recovered in the phase of this name."""
    return phase.startswith(WINDOW)


@runtime_checkable
class PhaseListener(Protocol):
    """A callback with these methods hears of the phases of a run."""

    def on_run_start(self, directory: Path, device: torch.device) -> None:
        """Begin a run: the libraries are loaded, the model is not.

        Args:
            directory: Directory of the run, also for measurements.
            device: The device that computes.
        """

    def on_phase_start(self, name: str) -> None:
        """Begin the phase `name`."""

    def on_phase_end(self, name: str) -> None:
        """End the phase `name`, whether it failed or not."""

    def on_run_end(self, failed: bool) -> None:
        """End the run, after its last phase."""


class Phases:
    """Announces the phases of a run, one after another, to those of `candidates` that listen."""

    def __init__(self, candidates: Iterable[Any] = ()) -> None:
        self.listeners = [one for one in candidates if isinstance(one, PhaseListener)]
        self.current: str | None = None

    def enter(self, name: str) -> None:
        """End the current phase, if any, and begin `name`."""
        self.leave()
        self.current = str(name)  # of a `PhaseName` too
        for listener in self.listeners:
            listener.on_phase_start(self.current)

    def leave(self) -> None:
        """End the current phase, if any; every listener hears of it, even if another one raises."""
        ended, self.current = self.current, None
        if ended is not None:
            with ExitStack() as stack:
                for listener in reversed(self.listeners):
                    stack.callback(listener.on_phase_end, ended)

    @contextmanager
    def run(self, directory: Path, device: torch.device = CPU) -> Iterator[None]:
        """Announce a whole run that writes to `directory` and computes on `device`."""
        failed = True
        with ExitStack() as stack:
            for listener in reversed(self.listeners):
                stack.callback(lambda one=listener: one.on_run_end(failed))
            stack.callback(self.leave)
            for listener in self.listeners:
                listener.on_run_start(directory, device)
            yield
            failed = False
