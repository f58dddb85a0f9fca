"""Cells as jobs of a SLURM cluster, submitted as arrays by submitit."""

import getpass
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from recon.basics.locks import locked
from recon.basics.refusals import UsageError
from recon.experiment.comparison.cell import Cell, is_free, of_cell, output
from recon.experiment.comparison.cluster import Cluster, is_of_job
from recon.experiment.comparison.job import SIGNAL_DELAY, CellJob
from recon.experiment.comparison.pool import Pool
from recon.experiment.comparison.workers import threads_of
from recon.report import Report

log = logging.getLogger("recon")

PAUSE = 1.0
"""Seconds between two looks at the files of jobs."""

QUEUE_PAUSE = 10.0
"""Seconds between two questions to SLURM: one for all jobs."""

GRACE = 30.0
"""Seconds for the result of a job to be seen on this machine after the job has left the queue."""

STARTS = 2
"""Jobs of a cell that are lost before it fails."""

REQUEUES = 100
"""Times that a job is queued again at its time limit."""


def require_slurm() -> None:
    """Refuse jobs where they cannot be submitted.

    Raises:
        UsageError: If submitit is not installed or there is no `sbatch`.
    """
    if find_spec("submitit") is None:
        raise UsageError(
            "--workers slurm needs the package submitit, which is not installed; install it "
            "(pip install 'recon-llm[slurm]'), or give a number of workers"
        )
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--workers slurm needs the command sbatch on the PATH, got none; start on a machine that submits jobs to a "
            "SLURM cluster, or give a number of workers"
        )


@dataclass
class UnderWay:
    """A cell with a job in the queue.

    Args:
        cell: The cell.
        prefix: Stands before its lines.
        lock: Holds the lock of the cell's job.
        job: Of submitit's; None until it is submitted.
        starts: Jobs that the cell had.
        state: What SLURM said last.
        missed: When the job was first missing in the queue.
        read: Characters of the cell's output that are shown.
    """

    cell: Cell
    prefix: str
    lock: ExitStack
    job: Any = None
    starts: int = 0
    state: str = ""
    missed: float | None = None
    read: int = 0


class Jobs(Pool):
    """Cells as jobs of a SLURM cluster. They outlive this process, unless it stops them.

    While a job is queued or runs, this process holds the lock of the cell's job; while the cell runs, its job holds
    the lock of the cell. Other commands in the directory so leave our cells alone, and take those of a command
    that was killed.

    Args:
        cluster: What jobs ask for.
        directory: Directory of the comparison, which all nodes see; the files of jobs go into its `jobs`.
        threads: CPU threads of each process; if None, as many as its cores.
    """

    def __init__(self, cluster: Cluster, directory: Path, threads: int | None = None) -> None:
        import submitit

        self._cluster = cluster
        self._variables = threads_of(threads or cluster.cpus_per_process)
        # The shell of the job becomes the process that waits for the cell, so that it gets the signals of the job.
        self._executor = submitit.SlurmExecutor(
            directory / "jobs", max_num_timeout=REQUEUES, python=f"exec {shlex.quote(sys.executable)}"
        )
        self._waiting: list[UnderWay] = []
        self._submitted: list[UnderWay] = []
        self._asked = time.monotonic()

    @property
    def has_room(self) -> bool:
        """Whether another job may be queued."""
        return len(self._waiting) + len(self._submitted) < self._cluster.max_jobs

    def take(self, cell: Cell, prefix: str) -> bool:
        """See `Pool`; the job is submitted by `wait`, together with others."""
        lock = ExitStack()
        if not lock.enter_context(locked(cell.directory / ".job.lock", wait=False)) or not is_free(cell):
            lock.close()
            return False
        self._waiting.append(UnderWay(cell, prefix, lock))
        return True

    def wait(self, seconds: float | None) -> list[tuple[Cell, Report | str | None]]:
        """See `Pool`.

        Raises:
            ValueError: If SLURM refuses the jobs.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while self._waiting or self._submitted:
            self._submit()
            self._ask_queue()
            for one in self._submitted:
                _show_output(one)
            if ended := [(one, known) for one in list(self._submitted) if (known := self._result(one)) is not _UNKNOWN]:
                for one, _ in ended:
                    self._submitted.remove(one)
                    one.lock.close()
                return [(one.cell, known) for one, known in ended]
            if end is not None and time.monotonic() >= end:
                break
            time.sleep(PAUSE)
        return []

    def stop(self) -> None:
        """Cancel the jobs under way."""
        for one in self._submitted:
            one.job.cancel(check=False)
        for one in self._waiting + self._submitted:
            one.lock.close()
        self._waiting, self._submitted = [], []

    def _submit(self) -> None:
        """Submit the cells that wait, one array for all that ask for the same."""
        from submitit.core.utils import FailedJobError

        waiting, self._waiting = sorted(self._waiting, key=_size), []
        for (devices, num_nodes), group in groupby(waiting, _size):
            together = list(group)
            self._executor.update_parameters(**self._parameters(devices, num_nodes))
            try:
                with _outside_a_job():
                    jobs = self._executor.submit_array([CellJob(one.cell, self._variables) for one in together])
            except FailedJobError as error:
                self._waiting = waiting
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"SLURM refused the jobs of {len(together)} cells ({reason}); correct the options --cluster.*"
                ) from error
            for one, job in zip(together, jobs, strict=True):
                output(one.cell).unlink(missing_ok=True)  # of an earlier job
                one.job, one.starts, one.state, one.missed, one.read = job, one.starts + 1, "PENDING", None, 0
                log.info(f"{one.prefix} queued as job {job.job_id}", extra=of_cell(one.prefix))
                self._submitted.append(one)

    def _parameters(self, devices: int, num_nodes: int) -> dict[str, Any]:
        """The parameters of submitit for cells in so many processes."""
        cluster = self._cluster
        asked = {
            "account": cluster.account,
            "partition": cluster.partition,
            "gpus_per_node": devices * cluster.gpus_per_process or None,
        }
        return {name: value for name, value in asked.items() if value is not None} | {
            "job_name": "recon",
            "time": cluster.minutes,
            "nodes": num_nodes,
            "cpus_per_task": cluster.cpus_per_process,
            "mem": f"{round(devices * cluster.memory_gb * 1000)}M",
            "setup": cluster.setup or None,
            "array_parallelism": cluster.max_jobs,
            # One process of ours in each job, which starts those of the cell; for submitit it is the only task.
            "use_srun": False,
            "additional_parameters": {
                "ntasks_per_node": devices,
                "signal": f"B:USR2@{SIGNAL_DELAY}",
                "requeue": True,
                **cluster.options,
            },
        }

    def _ask_queue(self) -> None:
        """Ask SLURM for the states of all jobs, now and then; keep what is known if it does not answer."""
        if time.monotonic() - self._asked < QUEUE_PAUSE:
            return
        self._asked = time.monotonic()
        if (states := _states()) is None:
            return
        for one in self._submitted:
            state = states.get(one.job.job_id)
            if state is None:
                one.missed = one.missed or time.monotonic()
                continue
            one.missed = None
            if state != one.state:
                log.info(f"{one.prefix} job {one.job.job_id} is {state.lower()}", extra=of_cell(one.prefix))
            one.state = state

    def _result(self, one: UnderWay) -> Any:
        """What came of a cell; `_UNKNOWN` as long as its job is under way."""
        if one.job.paths.result_pickle.exists():
            try:
                return one.job.result()
            except Exception as error:
                return f"job {one.job.job_id} raised an error, see {one.job.paths.stderr}: {_last_line(error)}"
        if one.missed is None or time.monotonic() - one.missed < GRACE:
            return _UNKNOWN
        if one.starts >= STARTS:
            return f"its job was lost {STARTS} times, see {one.job.paths.stderr}"
        log.warning(f"{one.prefix} job {one.job.job_id} was lost; the cell is queued again", extra=of_cell(one.prefix))
        self._submitted.remove(one)
        self._waiting.append(one)
        return _UNKNOWN


RULE = "-" * 22
"""Stands around the traceback in an error of submitit."""

_UNKNOWN = object()
"""The result of a job under way."""


def _size(one: UnderWay) -> tuple[int, int]:
    """Processes on each node, and nodes."""
    return one.cell.devices, one.cell.num_nodes


def _states() -> Mapping[str, str] | None:
    """The states of the user's jobs in the queue, by job; None if SLURM does not answer.

    Asked of the controller, which every cluster has: `sacct`, which submitit asks, needs a database of accounts.
    """
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i %T"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def _show_output(one: UnderWay) -> None:
    """Repeat the lines that the cell has written since the last look, behind its prefix."""
    file = output(one.cell)
    if not file.exists():
        return
    if file.stat().st_size < one.read:  # begun again
        one.read = 0
    with file.open("rb") as written:
        written.seek(one.read)
        lines, end, _ = written.read().rpartition(b"\n")
    one.read += len(lines) + len(end)
    for line in lines.decode(errors="replace").splitlines():
        log.info(f"{one.prefix} {line.rstrip()}", extra=of_cell(one.prefix))


def _last_line(error: Exception) -> str:
    """The last line of the traceback that submitit puts between two rules; of another error, its own."""
    _, _, behind = str(error).partition(RULE)
    lines = (behind.partition(RULE)[0] or str(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@contextmanager
def _outside_a_job() -> Iterator[None]:
    """Hide the variables of the job that this process runs in, if any: those that it submits would inherit them."""
    ours = {name: os.environ.pop(name) for name in list(os.environ) if is_of_job(name)}
    try:
        yield
    finally:
        os.environ.update(ours)
