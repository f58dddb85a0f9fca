"""Pools run cells: in child processes of this one here, in jobs of a cluster in `jobs.py`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from recon.basics.children import Children
from recon.experiment.comparison.cell import Cell, is_free, outcome
from recon.experiment.comparison.forks import Forks
from recon.report import Report


class Pool(ABC):
    """Runs cells, several at a time."""

    @property
    @abstractmethod
    def has_room(self) -> bool:
        """Whether it takes another cell."""

    @abstractmethod
    def take(self, cell: Cell, prefix: str) -> bool:
        """Run a cell, unless another process runs it.

        Args:
            cell: The cell.
            prefix: Stands before its lines.

        Returns:
            Whether it is under way here.
        """

    @abstractmethod
    def wait(self, seconds: float | None) -> list[tuple[Cell, Report | str | None]]:
        """Wait until a cell has ended.

        Args:
            seconds: At most; None for as long as that takes.

        Returns:
            The cells that have ended, each with its report, or why it failed; None if another process runs it.

        Raises:
            OSError: If a cell's directory cannot be written.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the cells under way, and start no more."""


@dataclass(frozen=True)
class UnderWay:
    """A cell that runs.

    Args:
        cell: The cell.
        worker: Runs it.
    """

    cell: Cell
    worker: Mapping[str, str]


class Processes(Pool):
    """Cells as child processes of this one, which end with it.

    Args:
        workers: Environment variables for the cells of each worker; there are as many cells under way as workers.
        warm: Whether cells are forks of a process that has imported recon.
    """

    def __init__(self, workers: Sequence[Mapping[str, str]] = ({},), warm: bool = False) -> None:
        self._free = list(workers)
        self._threads = ThreadPoolExecutor(len(workers))
        self._children = Forks() if warm else Children()
        self._under_way: dict[Future[Report | str | None], UnderWay] = {}

    @property
    def has_room(self) -> bool:
        """Whether a worker is free."""
        return bool(self._free)

    def take(self, cell: Cell, prefix: str) -> bool:
        """See `Pool`."""
        if not is_free(cell):
            return False
        worker = self._free.pop(0)
        self._under_way[self._threads.submit(outcome, cell, prefix, self._children, worker)] = UnderWay(cell, worker)
        return True

    def wait(self, seconds: float | None) -> list[tuple[Cell, Report | str | None]]:
        """See `Pool`."""
        done, _ = wait(self._under_way, seconds, FIRST_COMPLETED)
        ended = []
        for run in done:
            one = self._under_way.pop(run)
            self._free.append(one.worker)
            ended.append((one.cell, run.result()))
        return ended

    def stop(self) -> None:
        """See `Pool`."""
        self._children.stop()
        self._threads.shutdown(cancel_futures=True)
