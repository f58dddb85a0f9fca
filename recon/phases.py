"""The phases of a run (load, prune, each window, save, evaluate), announced to whoever measures them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PhaseListener(Protocol):
    """What wants to know where a run is: callbacks that have these methods are told."""

    def on_run_start(self, directory: Path) -> None:
        """The libraries are loaded, the model is not; what is measured may be written to `directory`."""

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
        """End the current phase, if any."""
        if self.current is not None:
            for listener in self.listeners:
                listener.on_phase_end(self.current)
        self.current = None

    @contextmanager
    def run(self, directory: Path) -> Iterator[None]:
        """Announce a whole run that writes to `directory`."""
        for listener in self.listeners:
            listener.on_run_start(directory)
        failed = True
        try:
            yield
            failed = False
        finally:
            self.leave()
            for listener in self.listeners:
                listener.on_run_end(failed)
