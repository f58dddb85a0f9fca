"""The scripts that start several processes: torchrun's for real, SLURM's with stand-ins for its commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
TORCHRUN, SLURM = LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch"
BIN = str(Path(sys.executable).parent)
SET_BY_SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "6",
}
LAUNCHERS = r"^(SLURM_|SBATCH_|SRUN_|MASTER_|NNODES$|NODE_RANK$|NPROC_PER_NODE$|OMP_NUM_THREADS$)"

RECORD = """#!/usr/bin/env bash
# Writes its arguments, one a line, to a file of its name.
printf '%s\\n' "$@" >"$STAND_INS/$(basename "$0").arguments"
"""
STAND_INS = {
    "scontrol": RECORD,
    # The tasks get the signal; the real one finds them by the job's number.
    "scancel": RECORD + 'kill -TERM "$(cat "$STAND_INS/step.pid")"\n',
    # Runs until it gets TERM and ends with SRUN_STATUS then; at once if there is ENDS_AT_ONCE.
    "srun": RECORD
    + """echo "$OMP_NUM_THREADS" >"$STAND_INS/threads"
[ -z "${ENDS_AT_ONCE:-}" ] || exit "$SRUN_STATUS"
trap 'touch "$STAND_INS/step.got.TERM"; exit "$SRUN_STATUS"' TERM
echo $$ >"$STAND_INS/step.pid.partial"
mv "$STAND_INS/step.pid.partial" "$STAND_INS/step.pid"
while true; do sleep 0.05; done
""",
}


def environment(**more: str) -> dict[str, str]:
    """The environment of a script, without what another launcher may have set, and the venv's commands first."""
    kept = {name: value for name, value in os.environ.items() if not re.match(LAUNCHERS, name)}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | more


def run(script: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(script), *args], env=environment(**variables), capture_output=True, text=True)


class Slurm:
    """SLURM's commands on PATH, made of shell scripts; what they were given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name, text in STAND_INS.items():
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        self.jobs: list[subprocess.Popen[str]] = []

    def submit(self, *args: str, **variables: str) -> subprocess.Popen[str]:
        """The batch script, started as `sbatch` starts it, in a process group of its own."""
        path = f"{self.directory}:{BIN}:{os.environ['PATH']}"
        job = subprocess.Popen(
            ["bash", str(SLURM), *args],
            env=environment(**SET_BY_SBATCH | {"PATH": path, "STAND_INS": str(self.directory)} | variables),
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(job)
        return job

    def wait_for_step(self, job: subprocess.Popen[str]) -> None:
        """Until the step runs and would notice a signal."""
        while not (self.directory / "step.pid").exists():
            assert job.poll() is None, "the job ended before its step began"
            time.sleep(0.02)

    def given(self, command: str) -> list[str] | None:
        """The arguments that `command` was called with; None if it was not called."""
        file = self.directory / f"{command}.arguments"
        return file.read_text().splitlines() if file.exists() else None


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path)
    yield cluster
    for job in cluster.jobs:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            job.wait()


def test_torchrun_in_two_processes(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *("bash", str(TORCHRUN), "scopes/full", "strategies/zero2", "--trainer.accelerator", "cpu"),
            *("--data.num_sequences", "16", "--data.seq_len", "32", "--data.num_test", "4"),
            *("--data.num_validation", "4", "--data.batch_size", "4", "--model.epochs", "1"),
            *("--baselines", "false", "--summary", "false", "--run_dir", "here"),
        ],
        env=environment(
            NPROC_PER_NODE="2", DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    assert (report["environment"]["processes"], report["environment"]["strategy"]) == (2, "zero2")
    assert report["mask_violations"] == 0
    assert "Traceback" not in result.stderr
    assert "OMP_NUM_THREADS" not in result.stderr


@pytest.mark.parametrize("script", [TORCHRUN, SLURM], ids=lambda script: script.name)
def test_without_arguments_usage(script: Path) -> None:
    result = run(script)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
    assert script.name in result.stderr


@pytest.mark.parametrize("given", [{}, {"NODE_RANK": "0"}, {"MASTER_ADDR": "node-a"}], ids=str)
def test_torchrun_on_several_nodes_needs_to_know_which(given: dict[str, str]) -> None:
    result = run(TORCHRUN, "scopes/full", NNODES="2", **given)
    assert result.returncode == 2
    assert "NNODES=2 needs NODE_RANK (0 to 1" in result.stderr
    assert "MASTER_ADDR" in result.stderr


def test_slurm_script_parses_and_asks_for_what_it_uses() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE))
    assert asked.keys() >= {"nodes", "ntasks-per-node", "cpus-per-task", "time", "requeue"}
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert asked["signal"] == "B:USR1@180"
    assert asked["open-mode"] == "append"


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_step(status: int, slurm: Slurm) -> None:
    options = ["--model.name", "a name with spaces", "--data.seq_len=32"]
    job = slurm.submit("scopes/full", "strategies/zero3", *options, ENDS_AT_ONCE="yes", SRUN_STATUS=str(status))
    assert job.wait() == status
    assert slurm.given("srun") == [
        *("--kill-on-bad-exit=1", "--cpus-per-task=6", "recon", "fit", "-c", "scopes/full", "-c", "strategies/zero3"),
        *options,
        *("--trainer.devices", "4", "--trainer.num_nodes", "2"),
    ]
    assert (slurm.directory / "threads").read_text() == "6\n"
    assert slurm.given("scontrol") is None


@pytest.mark.parametrize("missing", SET_BY_SBATCH)
def test_slurm_script_needs_sbatch(missing: str) -> None:
    result = run(SLURM, "scopes/full", **{name: value for name, value in SET_BY_SBATCH.items() if name != missing})
    assert result.returncode == 2
    assert f"{missing} is not set: start this with sbatch" in result.stderr


def test_slurm_job_requeues_itself_at_the_time_limit(slurm: Slurm) -> None:
    job = slurm.submit("scopes/full", SRUN_STATUS="143")
    slurm.wait_for_step(job)
    job.send_signal(signal.SIGUSR1)
    job.wait()
    assert slurm.given("scancel") == ["--signal=TERM", "4711"]
    assert (slurm.directory / "step.got.TERM").exists()
    assert slurm.given("scontrol") == ["requeue", "4711"]


def test_slurm_job_that_finishes_at_the_time_limit_is_not_requeued(slurm: Slurm) -> None:
    job = slurm.submit("scopes/full", SRUN_STATUS="0")
    slurm.wait_for_step(job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 0
    assert slurm.given("scontrol") is None


def test_cancelled_slurm_job_is_not_requeued(slurm: Slurm) -> None:
    job = slurm.submit("scopes/full", SRUN_STATUS="143")
    slurm.wait_for_step(job)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait() != 0
    assert slurm.given("scontrol") is None
