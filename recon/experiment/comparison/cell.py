"""A cell of a comparison: one command of recon's, run as a child process so that its peaks are its own."""

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recon.basics.children import Children
from recon.basics.locks import locked
from recon.experiment.comparison.cluster import is_of_job
from recon.experiment.directory import RunDirectory
from recon.report import Report

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Cell:
    """One child process: a command of recon's and the directory of what it measures.

    Args:
        title: What progress lines call it.
        command: Arguments of `recon`.
        directory: Its run directory.
        budget: See `Report.budget`.
        devices: Processes that it asks for on each node.
        num_nodes: Nodes that it asks for.
    """

    title: str
    command: list[str]
    directory: Path
    budget: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    num_nodes: int = 1


def of_cell(prefix: str, has_ended: bool = False) -> dict[str, Any]:
    """What marks a log record as a line of a cell.

    Args:
        prefix: Of the cell's lines.
        has_ended: Whether it is the last.
    """
    return {"cell": prefix, "has_ended": has_ended}


def found(cell: Cell) -> Report | None:
    """The report of a cell that has ended; None if it has to run, or runs."""
    run = RunDirectory(cell.directory, None)
    return Report.load(run.report) if _is_finished(run) else None


def is_free(cell: Cell) -> bool:
    """Whether nobody runs the cell."""
    with locked(_lock(cell), wait=False) as is_free:
        return is_free


def outcome(
    cell: Cell, prefix: str, children: Children, variables: Mapping[str, str], launcher: Sequence[str] = ()
) -> Report | str | None:
    """The report of a cell, found or made now, or why there is none; None while another process runs the cell.

    Args:
        cell: What to run if its directory holds no report.
        prefix: Stands before each of its lines.
        children: Starts its process.
        variables: Environment variables of the process beside ours.
        launcher: Command of a cluster that starts the processes of the cell within our job, and ends them with it.

    Raises:
        Stopped: If `children` were stopped.
    """
    with locked(_lock(cell), wait=False) as is_free:
        if not is_free:
            return None
        # Looked up again: another process may have ended the cell before this one had the lock.
        if (report := found(cell)) is not None:
            return report
        error = _run(cell, prefix, children, variables, launcher)
    return Report.load(RunDirectory(cell.directory, None).report) if error is None else error


def _is_finished(run: RunDirectory) -> bool:
    """Whether the cell has ended, undamaged; else its own command makes it again, or refuses."""
    try:
        return run.is_finished
    except ValueError:  # its manifest is damaged
        return False


def _lock(cell: Cell) -> Path:
    return cell.directory / ".cell.lock"


def _run(
    cell: Cell, prefix: str, children: Children, variables: Mapping[str, str], launcher: Sequence[str]
) -> str | None:
    """Run a cell, once more if its process was killed; the reason if it failed.

    The second start goes on from the files of the first. It is the last: a cell that takes more memory than there is
    would be killed again and again.
    """
    status = _process(cell, prefix, children, variables, launcher)
    if status < 0:
        log.warning(f"{prefix} its process was killed by {_name(-status)}; it is started again", extra=of_cell(prefix))
        status = _process(cell, prefix, children, variables, launcher)
    if status == 0:
        return None
    kept = output(cell)
    reason = " ".join(kept.read_text().partition(f"recon {cell.command[0]}: error: ")[2].split())
    return reason or f"{f'exit status {status}' if status > 0 else f'killed by {_name(-status)} twice'}, see {kept}"


def _process(cell: Cell, prefix: str, children: Children, variables: Mapping[str, str], launcher: Sequence[str]) -> int:
    """Run a cell's process, repeat its lines behind `prefix`, keep them in its `output.txt`.

    Returns:
        The exit status of the process, negative for a signal that killed it.
    """
    cell.directory.mkdir(parents=True, exist_ok=True)
    command = [*launcher, sys.executable, "-m", "recon", *cell.command]
    ours = {name: value for name, value in os.environ.items() if launcher or not is_of_job(name)}
    environment = {**ours, **variables}
    with output(cell).open("w") as kept, children.started(command, environment, not launcher) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            kept.flush()
            log.info(f"{prefix} {line.rstrip()}", extra=of_cell(prefix))
    status = process.returncode
    assert status is not None
    return 128 - status if launcher and status > 128 else status


def output(cell: Cell) -> Path:
    """The file that its lines are kept in."""
    return cell.directory / "output.txt"


def _name(number: int) -> str:
    """The name of a signal; of most real-time signals the number."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
