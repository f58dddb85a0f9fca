"""The cells of a comparison: known, under way here, or run by another process."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from recon.basics.children import Children
from recon.experiment.comparison.cell import Cell, found, is_free, outcome
from recon.report import Report

log = logging.getLogger("recon")

PAUSE = 1.0
"""Seconds between two looks at cells of other processes."""


@dataclass(frozen=True)
class UnderWay:
    """A cell that runs.

    Args:
        cell: The cell.
        prefix: Stands before its lines.
        worker: Runs it.
    """

    cell: Cell
    prefix: str
    worker: Mapping[str, str]


class Cells:
    """The cells that this process knows, runs, or has seen in another process; a context that ends those under way.

    A comparison is gone through in passes, which run nothing themselves: a pass asks for all cells that it knows of,
    and each free worker takes the first of them that nobody runs. `wait` stands between two passes.

    Args:
        num: How many cells there are in all.
        workers: Environment variables for the cells of each worker.

    Attributes:
        are_known: Whether all cells of the present pass were known.
    """

    def __init__(self, num: int, workers: Sequence[Mapping[str, str]]) -> None:
        self._num = num
        self._free = list(workers)
        self._threads = ThreadPoolExecutor(len(workers))
        self._children = Children()
        self._outcomes: dict[Path, Report | str] = {}
        self._under_way: dict[Future[Report | str | None], UnderWay] = {}
        self._told: set[Path] = set()
        self.begin_pass()

    def __enter__(self) -> "Cells":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._children.stop()
        self._threads.shutdown(cancel_futures=True)

    def begin_pass(self) -> None:
        """Go through the comparison again."""
        self._elsewhere: list[Cell] = []
        self.are_known = True

    def get(self, cell: Cell) -> Report | str | None:
        """The report of `cell`, or why it failed; None if it is not known yet, then it runs or waits for a worker."""
        if cell.directory not in self._outcomes and all(cell != one.cell for one in self._under_way.values()):
            self._look_at(cell)
        known = self._outcomes.get(cell.directory)
        self.are_known &= known is not None
        return known

    def _look_at(self, cell: Cell) -> None:
        """Find the report of a cell, or give the cell to a worker if one is free."""
        if (report := found(cell)) is not None:
            self._outcomes[cell.directory] = report
        elif self._free and is_free(cell):
            prefix = f"[{len(self._outcomes) + len(self._under_way) + 1}/{self._num} {cell.title}]"
            worker = self._free.pop(0)
            run = self._threads.submit(outcome, cell, prefix, self._children, worker)
            self._under_way[run] = UnderWay(cell, prefix, worker)
        elif self._free:
            self._elsewhere.append(cell)

    def wait(self) -> None:
        """Wait until a cell of ours has ended; a moment if a worker is free for one that another process runs.

        Raises:
            OSError: If a cell's directory cannot be written.
        """
        if not self._under_way:
            for cell in self._elsewhere[:1]:
                if cell.directory not in self._told:
                    log.info(f"wait for {cell.title}, which another process runs")
                self._told.add(cell.directory)
            time.sleep(PAUSE)
        is_short = self._free and self._elsewhere
        ended, _ = wait(self._under_way, PAUSE if is_short else None, FIRST_COMPLETED)
        for run in ended:
            one = self._under_way.pop(run)
            self._free.append(one.worker)
            known = run.result()
            if isinstance(known, str):
                log.error(f"{one.prefix} failed: {known}")
            if known is not None:
                self._outcomes[one.cell.directory] = known
