"""A machine that has SLURM, and jobs whose tasks are not what the trainer was asked for."""

import os
import sys
import warnings
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from recon.basics.children import Children
from recon.cli import main
from recon.cli.quiet import quiet
from recon.distributed import ranks
from recon.experiment.comparison.cell import Cell, outcome
from tests.support.scope_fixtures import trainer_of

JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "recon", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `srun` on the PATH, and no job."""
    command = tmp_path / "bin" / "srun"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def in_job(monkeypatch: pytest.MonkeyPatch, tasks: int, step: bool = True, **more: str) -> None:
    names = JOB | {"SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks)} | more
    for name, value in (names | ({"SLURM_STEP_ID": "0"} if step else {})).items():
        monkeypatch.setenv(name, value)


def hints(in_a_job: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Lightning says of srun after `quiet`."""
    if in_a_job:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        SLURMEnvironment.detect()
    return [str(one.message) for one in caught if "srun" in str(one.message)]


@pytest.mark.usefixtures("srun")
def test_the_hint_is_silenced_outside_a_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hints(False, monkeypatch) == []
    assert len(hints(True, monkeypatch)) == 1


@pytest.mark.usefixtures("srun")
def test_outside_a_job_trainers_start_their_processes_themselves() -> None:
    ranks.require_started(trainer_of(), 1)
    ranks.require_started(trainer_of(devices=2, strategy="ddp"), 2)


@pytest.mark.parametrize(
    ("tasks", "step", "devices", "match"),
    [
        (1, True, 2, r"make 2 processes, got 1 from SLURM; ask SLURM for as many .* --ntasks-per-node"),
        (2, True, 1, r"make 1 processes, got 2 from SLURM"),
        (2, False, 2, r"2 processes need to be started by srun within the job"),
        (1, True, 1, None),
        (2, True, 2, None),
    ],
)
def test_a_job_has_as_many_tasks_as_was_asked_for(
    tasks: int, step: bool, devices: int, match: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, tasks, step)
    trainer = trainer_of(**{"devices": devices, "strategy": "ddp"} if devices > 1 else {})
    asked = trainer.num_devices * trainer.num_nodes
    if match is None:
        return ranks.require_started(trainer, asked)
    with pytest.raises(ValueError, match=match):
        ranks.require_started(trainer, asked)


def test_an_interactive_job_starts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, 1, SLURM_JOB_NAME="interactive")
    ranks.require_started(trainer_of(devices=2, strategy="ddp"), 2)


def test_the_command_stops_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, 1)
    two = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--run_dir", str(tmp_path / "run")]
    assert main(["fit", "-c", "scopes/full", "-c", "strategies/ddp", *two]) == 1
    said = capsys.readouterr()
    assert "trainer.devices and trainer.num_nodes make 2 processes, got 1 from SLURM" in said.err
    assert "load" not in said.out
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert main(["fit", "-c", "scopes/full", "-c", "strategies/ddp", *two]) == 2
    assert "Use `--ntasks-per-node=2` instead" in capsys.readouterr().err


def test_children_of_a_comparison_are_no_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, 1)
    monkeypatch.setenv("OTHER_VARIABLE", "kept")
    tell = tmp_path / "python"
    tell.write_text(f"#!/bin/sh\nenv > {tmp_path}/found\nexit 1\n")
    tell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tell))
    outcome(Cell("cell", ["fit"], tmp_path / "cell"), "cell", Children(), {})
    found = (tmp_path / "found").read_text()
    assert "OTHER_VARIABLE=kept" in found
    assert "SLURM_" not in found
