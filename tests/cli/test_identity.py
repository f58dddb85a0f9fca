"""The identity of a run: what decides what `recon fit` computes makes another run, and nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest

from recon.cli import main
from tests.cli.test_cli import DATA, RANDOM

EARLY_STOPPING = json.dumps(
    {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "held_out_loss"}}
)


def fit(run: Path, *options: str, scope: str = "full") -> int:
    epochs = [] if scope == "matrix" else ["--model.epochs=1"]
    command = ["fit", "-c", f"scopes/{scope}", "--run_dir", str(run), *RANDOM, *DATA, *epochs]
    return main([*command, "--data.batch_size=2", "--baselines=false", "--drift=false", *options])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("short") / "run"
    assert fit(run, "--trainer.max_steps=2") == 0
    return run


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "options.trainer.max_steps"),
        (["--trainer.max_steps=2", "--trainer.fast_dev_run=true"], "options.trainer.fast_dev_run"),
        (["--trainer.max_steps=2", "--trainer.max_time=00:00:00:30"], "options.trainer.max_time"),
        (["--trainer.max_steps=2", "--trainer.overfit_batches=1"], "options.trainer.overfit_batches"),
        (["--trainer.max_steps=2", "--trainer.limit_train_batches=1"], "options.trainer.limit_train_batches"),
        (["--trainer.max_steps=2", "--trainer.deterministic=true"], "options.trainer.deterministic"),
        (["--trainer.max_steps=2", "--trainer.devices=2"], "processes"),
        (["--trainer.max_steps=2", f"--trainer.callbacks+={EARLY_STOPPING}"], "options.trainer.callbacks"),
    ],
)
def test_what_decides_makes_another_run(options: list[str], named: str, short: Path, capsys: Any) -> None:
    assert fit(short, *options) == 1
    assert f"whose run differs in {named}" in capsys.readouterr().err


def test_what_only_watches_does_not(short: Path, capsys: Any) -> None:
    watching = ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=true"]
    monitor = json.dumps({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
    assert fit(short, "--trainer.max_steps=2", *watching, f"--trainer.callbacks+={monitor}") == 0
    assert "finished: nothing to do" in capsys.readouterr().out


def test_any_number_of_processes_may_share_the_windows(tmp_path: Path, capsys: Any) -> None:
    assert fit(tmp_path / "run", scope="matrix") == 0
    many = ["--trainer.strategy=window_parallel", "--trainer.devices=2"]
    assert fit(tmp_path / "run", *many, scope="matrix") == 0
    assert "finished: nothing to do" in capsys.readouterr().out
