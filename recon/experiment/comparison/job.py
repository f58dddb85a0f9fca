"""A cell within the job of a cluster: what submitit runs there."""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from recon.basics.children import Children
from recon.experiment.comparison.cell import Cell, outcome
from recon.report import Report

SIGNAL_DELAY = 180
"""Seconds between the signal that a job's time is nearly over and its end."""

PATIENCE = 150.0
"""Seconds of them for the cell to save its state."""


@dataclass(frozen=True)
class CellJob:
    """The cell of a job.

    The job holds the cell's lock as long as the cell runs, so the lock of a lost job is free. It goes on without the
    command that submitted it.

    Args:
        cell: What it runs.
        variables: Environment variables of the cell's processes.
    """

    cell: Cell
    variables: Mapping[str, str]

    def __call__(self) -> Report | str | None:
        """Run the cell: the report, why it failed, or None while another process runs it."""
        signal.signal(signal.SIGTERM, _end)
        return outcome(self.cell, self.cell.title, _children, self.variables, launcher(self.cell))

    def checkpoint(self) -> Any:
        """Save the state of the cell, as its time is nearly over; what is to be queued again."""
        from submitit.helpers import DelayedSubmission

        _children.end(PATIENCE)
        return DelayedSubmission(self)


_children = Children()
"""The processes of this job's cell."""


def launcher(cell: Cell) -> list[str]:
    """The command that starts the processes of a cell within a job; none for a single process."""
    if cell.devices * cell.num_nodes == 1:
        return []
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not take it over from sbatch
    return [
        *("srun", "--kill-on-bad-exit=1", f"--nodes={cell.num_nodes}", f"--ntasks-per-node={cell.devices}"),
        *([f"--cpus-per-task={cpus}"] if cpus else []),
    ]


def _end(number: int, frame: FrameType | None) -> None:
    """End the cell and the job without a result: it is cancelled, or another job takes its place.

    Raises:
        SystemExit: Always.
    """
    _children.end(PATIENCE)
    sys.exit(128 + number)
