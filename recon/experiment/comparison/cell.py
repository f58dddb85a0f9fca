"""A cell of a comparison: one command of recon's, run as a child process so that its peaks are its own."""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recon.basics.children import parent_of_children
from recon.basics.locks import locked
from recon.experiment.carding import write_card
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
    """

    title: str
    command: list[str]
    directory: Path


def outcome(cell: Cell, prefix: str) -> Report | str | None:
    """The report of a cell, found or made now, or why there is none; None while another process runs the cell.

    Args:
        cell: What to run if its directory holds no report.
        prefix: Stands before each of its lines.
    """
    run = RunDirectory(cell.directory, None)
    if not _is_finished(run):
        with locked(_lock(cell), wait=False) as is_free:
            if not is_free:
                return None
            # Looked up again: another process may have ended the cell before this one had the lock.
            error = None if _is_finished(run) else _run(cell, prefix)
        if error is not None:
            log.error(f"{prefix} failed: {error}")
            return error
    write_card(run)  # of a cell that was killed before it had written it
    return Report.load(run.report)


def wait_for(cell: Cell) -> None:
    """Wait until no process runs the cell."""
    with locked(_lock(cell)):
        pass


def _is_finished(run: RunDirectory) -> bool:
    """Whether the cell has ended, undamaged; else its own command makes it again, or refuses."""
    try:
        return run.is_finished
    except ValueError:  # its manifest is damaged
        return False


def _lock(cell: Cell) -> Path:
    return cell.directory / ".cell.lock"


def _run(cell: Cell, prefix: str) -> str | None:
    """Run a cell, repeat its lines behind `prefix`, keep them in its `output.txt`; the reason if it failed."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    log_file = cell.directory / "output.txt"
    command = [sys.executable, "-m", "recon", *cell.command]
    with (
        log_file.open("w") as kept,
        parent_of_children(),
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                log.info(f"{prefix} {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return None
    reason = log_file.read_text().partition(f"recon {cell.command[0]}: error: ")[2]
    return " ".join(reason.split()) or f"exit status {process.returncode}, see {log_file}"


def _environment() -> dict[str, str]:
    """The environment of a child: with a job's variables it would take itself for one of the job's tasks."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
