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

LAUNCH = Path(__file__).parents[2] / "launch"
TORCHRUN, SLURM, WINDOWS = LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch", LAUNCH / "slurm_windows.sbatch"
BIN = str(Path(sys.executable).parent)
SET_BY_SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "6",
}
SET_BY_SBATCH_ARRAY = {
    "SLURM_ARRAY_JOB_ID": "4711",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "16",
    "SLURM_ARRAY_TASK_MAX": "16",
    "SLURM_CPUS_PER_TASK": "6",
}
LAUNCHERS = r"^(PARTS$|SLURM_|SBATCH_|SRUN_|MASTER_|NNODES$|NODE_RANK$|NPROC_PER_NODE$|OMP_NUM_THREADS$)"

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

    def submit(self, *args: str, script: Path = SLURM, **variables: str) -> subprocess.Popen[str]:
        """The batch script, started as `sbatch` starts it, in a process group of its own."""
        given = SET_BY_SBATCH if script == SLURM else SET_BY_SBATCH_ARRAY
        path = f"{self.directory}:{BIN}:{os.environ['PATH']}"
        job = subprocess.Popen(
            ["bash", str(script), *args],
            env=environment(**given | {"PATH": path, "STAND_INS": str(self.directory)} | variables),
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


@pytest.mark.slow
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


@pytest.mark.parametrize("script", [TORCHRUN, SLURM, WINDOWS], ids=lambda script: script.name)
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


@pytest.mark.parametrize("script", [SLURM, WINDOWS], ids=lambda script: script.name)
def test_slurm_script_parses_and_asks_for_what_it_uses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
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


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    ("variables", "part"), [({}, "3/16"), ({"PARTS": "16", "SLURM_ARRAY_TASK_COUNT": "2"}, "3/16")], ids=["all", "some"]
)
def test_slurm_task_of_an_array(variables: dict[str, str], part: str, status: int, slurm: Slurm) -> None:
    variables = variables | {"ENDS_AT_ONCE": "yes", "SRUN_STATUS": str(status)}
    job = slurm.submit("scopes/submodule", "--run_dir", "a directory", script=WINDOWS, **variables)
    assert job.wait() == status
    assert slurm.given("srun") == [
        *("--cpus-per-task=6", "recon", "fit", "-c", "scopes/submodule", "--run_dir", "a directory", "--windows", part)
    ]
    assert slurm.given("scontrol") is None


def test_slurm_array_of_some_parts_needs_to_know_how_many() -> None:
    result = run(WINDOWS, "scopes/block", **SET_BY_SBATCH_ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"})
    assert result.returncode == 2
    assert "or some of these with PARTS=N" in result.stderr


@pytest.mark.parametrize(
    ("script", "missing"),
    [(SLURM, name) for name in SET_BY_SBATCH] + [(WINDOWS, name) for name in SET_BY_SBATCH_ARRAY],
    ids=str,
)
def test_slurm_script_needs_sbatch(script: Path, missing: str) -> None:
    given = SET_BY_SBATCH if script == SLURM else SET_BY_SBATCH_ARRAY
    result = run(script, "scopes/full", **{name: value for name, value in given.items() if name != missing})
    assert result.returncode == 2
    assert f"{missing} is not set: start this with sbatch" in result.stderr


@pytest.mark.parametrize(("script", "job_id"), [(SLURM, "4711"), (WINDOWS, "4711_3")], ids=["job", "task"])
def test_slurm_job_requeues_itself_at_the_time_limit(script: Path, job_id: str, slurm: Slurm) -> None:
    job = slurm.submit("scopes/full", script=script, SRUN_STATUS="143")
    slurm.wait_for_step(job)
    job.send_signal(signal.SIGUSR1)
    job.wait()
    assert slurm.given("scancel") == ["--signal=TERM", job_id]
    assert (slurm.directory / "step.got.TERM").exists()
    assert slurm.given("scontrol") == ["requeue", job_id]


@pytest.mark.parametrize("script", [SLURM, WINDOWS], ids=lambda script: script.name)
def test_slurm_job_that_finishes_at_the_time_limit_is_not_requeued(script: Path, slurm: Slurm) -> None:
    job = slurm.submit("scopes/full", script=script, SRUN_STATUS="0")
    slurm.wait_for_step(job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 0
    assert slurm.given("scontrol") is None


@pytest.mark.parametrize("script", [SLURM, WINDOWS], ids=lambda script: script.name)
def test_cancelled_slurm_job_is_not_requeued(script: Path, slurm: Slurm) -> None:
    job = slurm.submit("scopes/full", script=script, SRUN_STATUS="143")
    slurm.wait_for_step(job)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait() != 0
    assert slurm.given("scontrol") is None
