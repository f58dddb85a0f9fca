"""The phases of a run (load, prune, each window, save, evaluate), announced to whoever measures them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

CPU = torch.device("cpu")


@runtime_checkable
class PhaseListener(Protocol):
    """What wants to know where a run is: callbacks that have these methods are told."""

    def on_run_start(self, directory: Path, device: torch.device) -> None:
        """The libraries are loaded, the model is not; what is measured may be written to `directory`.

        Args:
            directory: Of the run.
            device: Where it computes.
        """

    def on_phase_start(self, name: str) -> None:
        """Phase `name` begins."""

    def on_phase_end(self, name: str) -> None:
        """Phase `name` ended, or failed."""

    def on_run_end(self, failed: bool) -> None:
        """The last phase ended, or the run `failed`."""


class Phases:
    """Announces the phases of a run, one after another, to those of `candidates` that listen."""

    def __init__(self, candidates: Iterable[Any] = ()) -> None:
        self.listeners = [one for one in candidates if isinstance(one, PhaseListener)]
        self.current: str | None = None

    def enter(self, name: str) -> None:
        """End the current phase, if any, and begin `name`."""
        self.leave()
        self.current = name
        for listener in self.listeners:
            listener.on_phase_start(name)

    def leave(self) -> None:
        """End the current phase, if any; every listener hears of it, whatever others raise."""
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
