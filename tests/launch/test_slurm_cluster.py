"""The scripts and comparisons on a real SLURM, which is started on this machine."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.slurm_cluster import ROOT, SlurmCluster, missing, slurm_cluster

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: true}"
)
SMALL = [
    *("--model.name", "random", "--model.shape", SHAPE, "--pattern", "2:4", "--trainer.accelerator", "cpu"),
    *("--data.seq_len", "32", "--data.num_validation", "4", "--data.num_test", "4"),
    *("--baselines", "false", "--summary", "false", "--drift", "false"),
]
LONG = 100
"""Epochs of a fit that is interrupted."""

COMPARISON = f"""
data: {{num_sequences: 16, seq_len: 32}}    # all of the test text: the dense cell runs as long as a command starts
options: {{trainer.accelerator: cpu, drift: false}}
recoveries:
  - scope: matrix
  - scope: full
    options: {{model.epochs: {LONG}, data.batch_size: 2, checkpoint_every_n_steps: 20}}
  - scope: full
    label: full, zero2 x2
    config: [scopes/full, strategies/zero2]
    options: {{model.epochs: 2, data.batch_size: 4, trainer.devices: 2, trainer.precision: 32-true}}
"""
QUICK = """
from recon.experiment.comparison import jobs
jobs.PAUSE, jobs.QUEUE_PAUSE, jobs.GRACE = 0.2, 0.5, 3.0
from recon.cli import main
raise SystemExit(main())
"""
"""`recon`, with shorter pauses than a cluster of many users likes."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("c")) as running:
        yield running


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory to submit from, with the environment where a clone has it."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def report(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


def two_tasks(cluster: SlurmCluster, clone: Path, name: str) -> str:
    """Submit full retraining by ZeRO-2 in two tasks."""
    return cluster.submit(
        *("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", f"--output={name}.log"),
        *(str(ROOT / "launch/slurm.sbatch"), "scopes/full", "strategies/zero2", "--run_dir", name, *SMALL),
        *("--data.num_sequences", "16", "--data.batch_size", "1", "--model.epochs", str(LONG // 4)),
        *("--checkpoint_every_n_steps", "10", "--trainer.precision", "32-true"),
        cwd=clone,
    )


def test_two_tasks_and_a_requeue_before_the_time_limit(cluster: SlurmCluster, clone: Path) -> None:
    two_tasks(cluster, clone, "whole")
    cluster.wait_for_end()
    whole = report(clone / "whole")
    assert (whole["environment"]["processes"], whole["environment"]["strategy"]) == (2, "zero2")
    assert whole["mask_violations"] == 0

    job = two_tasks(cluster, clone, "stopped")
    cluster.wait_for(lambda: list(clone.glob("stopped/checkpoints/*")), "a checkpoint")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: "Restarts=1 " in cluster.call("scontrol", "show", "job", job), "a requeue")
    assert not (clone / "stopped" / "report.json").exists()
    cluster.wait_for_end()
    assert (clone / "stopped.log").read_text().count("load random") == 2
    assert "go on from stopped/checkpoints/step-" in (clone / "stopped.log").read_text()
    assert report(clone / "stopped")["perplexity"] == whole["perplexity"]


def test_an_array_of_windows_and_its_merge(cluster: SlurmCluster, clone: Path) -> None:
    """The merge as the head of the script has it."""
    script = ROOT / "launch/slurm_windows.sbatch"
    options = ["scopes/submodule", "--run_dir", "runs/x", *SMALL, "--data.num_sequences=8", "--model.epochs=1"]
    array = cluster.submit(
        *("--array=1-2", "--gpus-per-node=1", "--cpus-per-task=1", "--output=part-%a.log"),
        str(script),
        *options,
        cwd=clone,
    )
    (line,) = re.findall(r"^# sbatch (--dependency=.* --wrap \".*\")", script.read_text(), re.MULTILINE)
    line = line.replace("<its number>", array)
    given = [one.strip('"') for one in re.findall(r'".*?"|\S+', line)]
    cluster.environment, with_path = without_venv(cluster.environment), cluster.environment
    cluster.submit("--output=merge.log", *given, cwd=clone)
    cluster.environment = with_path
    cluster.wait_for_end()
    said = (clone / "merge.log").read_text()
    assert (clone / "runs/x/report.json").exists(), said
    assert (report(clone / "runs/x")["environment"]["processes"], len(report(clone / "runs/x")["windows"])) == (2, 4)
    assert "`srun` command is available" not in said


def without_venv(environment: dict[str, str]) -> dict[str, str]:
    """An environment that is not active, as that of a user who has just logged in."""
    path = environment["PATH"].split(":")
    return environment | {"PATH": ":".join(one for one in path if not Path(one, "recon").exists())}


def command(directory: Path, own: Path, *more: str) -> list[str]:
    own.write_text(COMPARISON)
    return [*("compare", "-c", "comparisons/smoke", "-c", str(own), "--directory", str(directory)), *more]


def on_slurm(cluster: SlurmCluster, directory: Path, own: Path) -> subprocess.Popen[str]:
    """Start a comparison whose cells are jobs."""
    asked = ["--cluster.gpus_per_process=0", "--cluster.cpus_per_process=1", "--cluster.memory_gb=1"]
    line = [sys.executable, "-c", QUICK, *command(directory, own, "--workers=slurm", "-c", "clusters/slurm", *asked)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=cluster.environment, cwd=directory.parent, **pipes)


def job_of(directory: Path, said: list[str], title: str) -> str:
    """The last job of a cell, by what a comparison says."""
    return re.findall(rf" {title}\] queued as job (\S+)", "".join(said))[-1]


def follow(process: subprocess.Popen[str], said: list[str], until: str) -> None:
    """Read what a process says, up to a line."""
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if re.search(until, line):
            return
    raise AssertionError(f"no line with {until!r}: {''.join(said)}")


def results(directory: Path) -> list[tuple[str, str, float]]:
    cells = json.loads((directory / "results.json").read_text())["cells"]
    return [(cell["scope"], cell["label"], cell["perplexity"]) for cell in cells]


def test_a_comparison_loses_parents_and_jobs_and_has_the_numbers_of_one_process(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Two comparisons in a directory, the first killed; a job at its time limit, and one that is lost."""
    own, ours = tmp_path / "own.yaml", tmp_path / "ours"
    first = on_slurm(cluster, ours, own)
    heard: list[str] = []
    follow(first, heard, r"pruned\] queued as job")
    assert job_of(ours, heard, "dense").partition("_")[0] == job_of(ours, heard, "pruned").partition("_")[0]
    second, said = on_slurm(cluster, ours, own), []
    follow(second, said, "wait for dense, which another process runs")
    first.kill()
    first.communicate()
    follow(second, said, r" full\] queued as job")
    (full,) = ours.glob("full-????????")
    cluster.wait_for(lambda: list(full.glob("checkpoints/*")), "a checkpoint")
    cluster.call("scancel", "--batch", "--signal=USR2", job_of(ours, said, "full"))  # what SLURM does at the limit
    follow(second, said, r" full\] job \S+ is running" if "is running" in "".join(said) else r" full\] load random")
    follow(second, said, r" full\] load random")
    cluster.call("scancel", job_of(ours, said, "full"))
    follow(second, said, r" full\] job \S+ was lost; the cell is queued again")
    said.append(second.communicate()[0])
    assert second.returncode == 0, "".join(said)
    assert not cluster.queue()

    reports = {path.parent.name.rpartition("-")[0]: report(path.parent) for path in ours.glob("*/report.json")}
    assert reports["full-zero2-x2"]["environment"]["processes"] == 2
    alone = subprocess.run(
        [sys.executable, "-m", "recon", *command(tmp_path / "alone", own)],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    assert results(ours) == results(tmp_path / "alone")
    assert len(list(ours.glob("*-????????"))) == 5


def test_ctrl_c_cancels_the_jobs(cluster: SlurmCluster, tmp_path: Path) -> None:
    process, said = on_slurm(cluster, tmp_path / "runs", tmp_path / "own.yaml"), []
    follow(process, said, r"pruned\] queued as job")
    assert len(cluster.queue()) == 2
    process.send_signal(signal.SIGINT)
    said.append(process.communicate()[0])
    assert process.returncode == 130, "".join(said)
    cluster.wait_for_end(30)
    assert not list((tmp_path / "runs").glob("*/report.json"))


def test_a_partition_that_is_not_there_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    line = command(tmp_path / "runs", tmp_path / "own.yaml", "--workers=slurm", "--cluster.partition=nowhere")
    refused = subprocess.run(
        [sys.executable, "-m", "recon", *line], env=cluster.environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "SLURM refused the jobs of 2 cells" in refused.stderr
    assert "invalid partition specified: nowhere" in refused.stderr
    assert "correct the options --cluster.*" in refused.stderr
