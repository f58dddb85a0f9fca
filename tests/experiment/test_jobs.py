"""Cells as jobs of a cluster: shell scripts stand for SLURM's commands, and no job runs but where a test ends it."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recon.basics.children import Children, Stopped
from recon.basics.locks import locked
from recon.basics.manifest import Manifest
from recon.basics.refusals import UsageError
from recon.cli import main
from recon.cli.resolver import CommandResolver
from recon.experiment.comparison import jobs as module
from recon.experiment.comparison.cell import Cell
from recon.experiment.comparison.cluster import Cluster
from recon.experiment.comparison.job import CellJob, launcher
from recon.experiment.comparison.jobs import Jobs, require_slurm
from recon.experiment.comparison.spec import Comparison, Entry, plan
from recon.report import Report

cloudpickle = pytest.importorskip("cloudpickle", reason="needs submitit: the extra `slurm`")
pytest.importorskip("submitit", reason="needs submitit: the extra `slurm`")

REPORT = Report(scope="full", model="m", criterion="wanda", pattern="2:4", seed=0, perplexity=3.0)
STAND_INS = {
    "srun": "exit 1",
    "squeue": 'cat "$STAND_INS/queue"',
    "scancel": 'echo "$@" >>"$STAND_INS/cancelled"',
    # Keeps what it is given under the number of the job; refuses as long as there is a file `refuses`.
    "sbatch": """[ ! -e "$STAND_INS/refuses" ] || { echo "sbatch: error: no such partition" >&2; exit 1; }
number=$(ls "$STAND_INS" | grep -c submitted)
cp "$1" "$STAND_INS/submitted.$number"
env | grep ^SLURM_ >"$STAND_INS/variables"
echo "Submitted batch job $number"
""",
}


class Slurm:
    """What stands for a cluster.

    Args:
        directory: Of the stand-ins and of what they were given.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.set_queue()

    def set_queue(self, *jobs: str) -> None:
        (self.directory / "queue").write_text("".join(f"{job} RUNNING\n" for job in jobs))

    def submitted(self, number: int) -> str:
        return (self.directory / f"submitted.{number}").read_text()

    def end(self, job: str, result: Any = REPORT) -> None:
        """End a job of the comparison beside the stand-ins."""
        file = self.directory.parent / "jobs" / f"{job}_0_result.pkl"
        file.write_bytes(cloudpickle.dumps(("success", result)))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, script in STAND_INS.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_INS", str(directory))
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(module, "QUEUE_PAUSE", 0.0)
    monkeypatch.setattr(module, "GRACE", 0.0)
    return Slurm(directory)


def cell(directory: Path, name: str, devices: int = 1) -> Cell:
    return Cell(name, ["fit"], directory / name, devices=devices)


def test_cells_that_ask_for_the_same_are_an_array(slurm: Slurm, tmp_path: Path) -> None:
    cluster = Cluster(account="us", gpus_per_process=2, cpus_per_process=4, memory_gb=10.0, setup=["module load x"])
    jobs = Jobs(cluster, tmp_path)
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b", 2), cell(tmp_path, "c")]
    assert all(jobs.take(one, one.title) for one in cells)
    slurm.set_queue("0_0", "0_1", "1")
    assert jobs.wait(0.0) == []
    alike, larger = slurm.submitted(0), slurm.submitted(1)
    asked = {"account=us", "time=240", "cpus-per-task=4", "signal=B:USR2@180", "requeue", "nodes=1", "job-name=recon"}
    for script, more in (
        (alike, {"array=0-1%2", "ntasks-per-node=1", "gpus-per-node=2", "mem=10000M"}),
        (larger, {"ntasks-per-node=2", "gpus-per-node=4", "mem=20000M"}),
    ):
        lines = script.splitlines()
        assert {f"#SBATCH --{one}" for one in asked | more} <= set(lines)
        assert "module load x" in lines
        assert not any(line.startswith("srun") or "partition" in line for line in lines)
        assert any(line.startswith(f"exec {sys.executable} ") for line in lines)
    slurm.end("0_1")
    assert jobs.wait(None) == [(cells[2], REPORT)]
    slurm.end("0_0", "no memory")
    slurm.end("1", None)
    assert jobs.wait(None) == [(cells[0], "no memory"), (cells[1], None)]
    assert jobs.wait(None) == []


def test_jobs_are_bounded(slurm: Slurm, tmp_path: Path) -> None:
    jobs = Jobs(Cluster(max_jobs=2), tmp_path)
    for name in "ab":
        assert jobs.has_room
        jobs.take(cell(tmp_path, name), name)
    assert not jobs.has_room
    slurm.set_queue("0_0", "0_1")
    jobs.wait(0.0)
    assert not jobs.has_room
    slurm.end("0_0")
    jobs.wait(None)
    assert jobs.has_room


def test_the_cell_of_a_lost_job_is_queued_again_once(
    slurm: Slurm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs, one = Jobs(Cluster(), tmp_path), cell(tmp_path, "a")
    jobs.take(one, "[1/1 a]")
    ((ended, reason),) = jobs.wait(None)
    assert ended == one
    assert reason == f"its job was lost 2 times, see {tmp_path / 'jobs' / '1_0_log.err'}"
    assert caplog.messages == ["[1/1 a] job 0 was lost; the cell is queued again"]
    assert jobs.take(one, "a"), "its lock is free again"


def test_a_queue_that_does_not_answer_loses_no_job(slurm: Slurm, tmp_path: Path) -> None:
    jobs = Jobs(Cluster(), tmp_path)
    jobs.take(cell(tmp_path, "a"), "a")
    (slurm.directory / "queue").unlink()
    assert jobs.wait(0.1) == []
    slurm.end("0")
    assert [known for _, known in jobs.wait(None)] == [REPORT]


def test_an_error_in_a_job_fails_its_cell(slurm: Slurm, tmp_path: Path) -> None:
    jobs = Jobs(Cluster(), tmp_path)
    jobs.take(cell(tmp_path, "a"), "a")
    slurm.set_queue("0")
    jobs.wait(0.0)
    trace = "Traceback (most recent call last):\n  somewhere\nModuleNotFoundError: No module named 'recon'\n"
    (tmp_path / "jobs" / "0_0_result.pkl").write_bytes(cloudpickle.dumps(("error", trace)))
    ((_, reason),) = jobs.wait(None)
    assert str(reason).startswith("job 0 raised an error, see ")
    assert str(reason).endswith("ModuleNotFoundError: No module named 'recon'")


def test_a_cell_is_left_to_the_process_that_has_its_lock(slurm: Slurm, tmp_path: Path) -> None:
    one, first, second = cell(tmp_path, "a"), Jobs(Cluster(), tmp_path), Jobs(Cluster(), tmp_path)
    with locked(one.directory / ".cell.lock"):  # a worker or a job runs it
        assert not first.take(one, "a")
    assert first.take(one, "a")
    assert not second.take(one, "a"), "the job of the first is queued"
    first.stop()
    assert second.take(one, "a")
    second.stop()


def test_stopped_jobs_are_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    jobs = Jobs(Cluster(), tmp_path)
    for name in "ab":
        jobs.take(cell(tmp_path, name), name)
    slurm.set_queue("0_0", "0_1")
    jobs.wait(0.0)
    jobs.take(cell(tmp_path, "c"), "c")  # not submitted yet
    jobs.stop()
    assert (slurm.directory / "cancelled").read_text().split() == ["0_0", "0_1"]
    assert not (slurm.directory / "submitted.1").exists()


def test_lines_of_a_job_are_shown_as_they_come(slurm: Slurm, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recon")
    jobs, output = Jobs(Cluster(), tmp_path), tmp_path / "a" / "output.txt"
    jobs.take(cell(tmp_path, "a"), "[1/1 a]")
    output.write_text("of an earlier job\n")
    slurm.set_queue("0")
    jobs.wait(0.0)
    for text in ("one\ntw", "one\ntwo\nthree\n", "", "four\n"):  # the third: it begins again
        output.write_text(text)
        jobs.wait(0.0)
    said = ["queued as job 0", "job 0 is running", "one", "two", "three", "four"]
    assert caplog.messages == [f"[1/1 a] {line}" for line in said]


def test_jobs_do_not_inherit_the_job_of_this_process(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "77")
    monkeypatch.setenv("SLURM_CONF", "here")
    jobs = Jobs(Cluster(), tmp_path)
    jobs.take(cell(tmp_path, "a"), "a")
    slurm.set_queue("0")
    jobs.wait(0.0)
    assert (slurm.directory / "variables").read_text() == "SLURM_CONF=here\n"
    assert os.environ["SLURM_MEM_PER_CPU"] == "77"


def test_what_slurm_refuses_is_said(slurm: Slurm, tmp_path: Path) -> None:
    jobs = Jobs(Cluster(), tmp_path)
    jobs.take(cell(tmp_path, "a"), "a")
    (slurm.directory / "refuses").touch()
    with pytest.raises(ValueError, match=r"SLURM refused the jobs of 1 cells \(.*no such partition.*--cluster\.\*"):
        jobs.wait(None)


def test_a_job_runs_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell script stands for recon."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    REPORT.save(tmp_path / "a" / "report.json", Manifest(tmp_path / "a").writing)
    finished = (tmp_path / "a" / "report.json").read_bytes(), (tmp_path / "a" / "manifest.json").read_bytes()
    for name in ("report.json", "manifest.json"):
        (tmp_path / "a" / name).rename(tmp_path / name)
    program = tmp_path / "program.sh"
    program.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS"\ncp "{tmp_path}"/*.json "{tmp_path}/a"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    job = CellJob(cell(tmp_path, "a"), {"OMP_NUM_THREADS": "3"})
    with locked(tmp_path / "a" / ".cell.lock"):
        assert job() is None
    assert job() == REPORT
    assert (tmp_path / "a" / "output.txt").read_text() == "3\n"
    assert finished[0] == (tmp_path / "a" / "report.json").read_bytes()


def test_srun_starts_the_processes_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert launcher(Cell("a", [], Path("a"))) == []
    assert launcher(Cell("a", [], Path("a"), devices=4, num_nodes=2)) == [
        *("srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=6")
    ]


def test_processes_end_as_they_do_at_sigterm(tmp_path: Path) -> None:
    children, trapped = Children(), tmp_path / "trapped"
    script = f'trap "touch {trapped}; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
    begin = time.monotonic()

    def run() -> None:
        with children.started(["sh", "-c", script], os.environ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            children.end(60.0)

    with pytest.raises(Stopped):
        run()
    assert trapped.exists()
    assert time.monotonic() - begin < 30


def test_cells_know_their_processes() -> None:
    entries = [
        Entry("matrix"),
        Entry("full", ["scopes/full", "strategies/ddp"], {"trainer.devices": 2, "trainer.num_nodes": 3}),
        Entry("full", options={"trainer.accelerator": "cuda", "trainer.devices": [0, 1]}),
    ]
    comparison = Comparison("x", entries)
    (group,) = plan(comparison, comparison.models[0], CommandResolver(gpus=1))
    fits = [group.recovery(entry, {}) for entry in entries]
    assert [(fit.devices, fit.num_nodes) for fit in fits] == [(1, 1), (2, 3), (2, 1)]
    assert "--model.dtype=float32" in group.pruned.command  # as on a GPU, which this machine need not have
    (group,) = plan(comparison, comparison.models[0], CommandResolver(gpus=0))
    assert "--model.dtype=float32" not in group.pruned.command


def test_slurm_needs_submitit_and_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs the command sbatch on the PATH, got none"):
        require_slurm()
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"submitit, which is not installed; install it \(pip install 'recon-llm\["):
        require_slurm()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--cluster.minutes=0", "--cluster.minutes must be at least 1, got 0"),
        ("--cluster.gpus_per_process=-1", "--cluster.gpus_per_process must be at least 0, got -1"),
        ("--cluster.memory_gb=0", "--cluster.memory_gb must be above 0, got 0"),
        ("--cluster.partitions=x", "did you mean --cluster.partition?"),
        ("--threads=0", "--threads must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(option: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "-c", "comparisons/smoke", "--workers=slurm", "--directory", str(tmp_path / "runs"), option]
    assert main(line) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
