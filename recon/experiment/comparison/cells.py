"""The cells of a comparison: known, under way here, or run by another process."""

import logging
import time
from pathlib import Path
from types import TracebackType

from recon.experiment.comparison.cell import Cell, found, of_cell
from recon.experiment.comparison.pool import Pool
from recon.report import Report

log = logging.getLogger("recon")

PAUSE = 1.0
"""Seconds between two looks at cells of other processes."""


class Cells:
    """The cells that this process knows, runs, or has seen in another process; a context that ends those under way.

    A comparison is gone through in passes, which run nothing themselves: a pass asks for all cells that it knows of,
    and the pool takes the first of them that nobody runs, as long as it has room. `wait` stands between two passes.

    Args:
        num: How many cells there are in all.
        pool: Runs cells.

    Attributes:
        are_known: Whether all cells of the present pass were known.
    """

    def __init__(self, num: int, pool: Pool) -> None:
        self._num, self._pool = num, pool
        self._outcomes: dict[Path, Report | str] = {}
        self._under_way: dict[Path, str] = {}
        self._told: set[Path] = set()
        self.begin_pass()

    def __enter__(self) -> "Cells":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.stop()

    def begin_pass(self) -> None:
        """Go through the comparison again."""
        self._elsewhere: list[Cell] = []
        self.are_known = True

    def get(self, cell: Cell) -> Report | str | None:
        """The report of `cell`, or why it failed; None if it is not known yet, then it runs or waits for room."""
        if cell.directory not in self._outcomes and cell.directory not in self._under_way:
            self._look_at(cell)
        known = self._outcomes.get(cell.directory)
        self.are_known &= known is not None
        return known

    def _look_at(self, cell: Cell) -> None:
        """Find the report of a cell, or give the cell to the pool if that has room."""
        if (report := found(cell)) is not None:
            self._outcomes[cell.directory] = report
        elif self._pool.has_room:
            prefix = f"[{len(self._outcomes) + len(self._under_way) + 1}/{self._num} {cell.title}]"
            if self._pool.take(cell, prefix):
                self._under_way[cell.directory] = prefix
            else:
                self._elsewhere.append(cell)

    def wait(self) -> None:
        """Wait until a cell of ours has ended; a moment if there is room for one that another process runs.

        Raises:
            OSError: If a cell's directory cannot be written.
        """
        if not self._under_way:
            for cell in self._elsewhere[:1]:
                if cell.directory not in self._told:
                    log.info(f"wait for {cell.title}, which another process runs")
                self._told.add(cell.directory)
            time.sleep(PAUSE)
        is_short = self._pool.has_room and self._elsewhere
        for cell, known in self._pool.wait(PAUSE if is_short else None):
            prefix = self._under_way.pop(cell.directory)
            if isinstance(known, str):
                log.error(f"{prefix} failed: {known}", extra=of_cell(prefix, True))
            elif known is None:
                log.debug(f"{prefix} runs in another process", extra=of_cell(prefix, True))
            else:
                log.debug(f"{prefix} ended, perplexity {known.perplexity}", extra=of_cell(prefix, True))
            if known is not None:
                self._outcomes[cell.directory] = known
