"""A cell of a comparison: one command of recon's, run as a child process so that its peaks are its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recon.report import Report


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


def outcome(cell: Cell, prefix: str, say: Callable[[str], None]) -> Report | str:
    """The report of a cell, found or made now, or why there is none.

    Args:
        cell: What to run if its directory holds no report.
        prefix: Stands before each of its lines.
        say: Is told these lines.
    """
    file = cell.directory / "report.json"
    if not file.exists():
        error = _run(cell, prefix, say)
        if error is not None:
            say(f"{prefix} failed: {error}")
            return error
    return Report.load(file)


def _run(cell: Cell, prefix: str, say: Callable[[str], None]) -> str | None:
    """Run a cell, repeating its lines behind `prefix` and keeping them in its `log.txt`; why it failed, if it did."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    log_file = cell.directory / "log.txt"
    command = [sys.executable, "-m", "recon", *cell.command]
    # A job's variables say how many tasks it has; a child that found them would take itself for one of them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    with (
        log_file.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                say(f"{prefix} {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return None
    reason = log_file.read_text().partition(f"recon {cell.command[0]}: error: ")[2]
    return " ".join(reason.split()) or f"exit status {process.returncode}, see {log_file}"
