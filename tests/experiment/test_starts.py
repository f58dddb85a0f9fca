"""The cost of a run that had several starts: tokens and seconds of all of them, and what is not known of them."""

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from torch.utils.data import DataLoader

from recon.basics.run_paths import RunPaths
from recon.cli.fit import main
from recon.data import TokenData
from recon.experiment import recovery
from recon.experiment.checkpoints import Checkpoints
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction
from tests.cli.test_cli import DATA, RANDOM
from tests.support.distributed_runs import same, weights
from tests.support.scope_fixtures import data_of, prepared, save_tiny, trainer_of
from tests.support.slow import slow

PAUSE = 0.5
TOKENS = 2 * 8 * 32
"""Of two epochs."""


class Killed(BaseException):
    """What no handler catches, as nothing is after SIGKILL."""


class Stop(Callback):
    """Rests before every batch, and ends the run before the batch of a number, counted over epochs."""

    def __init__(self, batch: int, error: type[BaseException]) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        time.sleep(PAUSE)
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise self.error("the test says stop")


def fit(scope: str, run: Path, *callbacks: Callback, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """The report of `recon fit` with some callbacks more."""

    def recover(scope: Any, data: Any, trainer: L.Trainer, *rest: Any) -> Any:
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        return recovery.recover(scope, data, trainer, *rest)

    options = ["--data.batch_size=2"] if scope == "full" else ["--model.batch_size=2"]
    quick = ["--baselines=false", "--drift=false", "--summary=false", "--model.epochs=2"]
    with mock.patch("recon.cli.fit.recover", recover):
        assert main(["-c", f"scopes/{scope}", "--run_dir", str(run), *RANDOM, *DATA, *options, *quick, *more]) == 0
    return json.loads((run / "report.json").read_text()) if RunPaths(run).report.exists() else {}


@pytest.mark.parametrize("scope", [slow("block"), "full"])
def test_a_single_start_knows_its_cost(scope: str, tmp_path: Path) -> None:
    report = fit(scope, tmp_path / "run")
    assert report["train_tokens"] == TOKENS
    assert report["environment"]["resumed"] is False
    assert report["environment"]["seconds_at_least"] is False
    assert not RunPaths(tmp_path / "run").begun.exists()


@pytest.mark.slow
def test_full_retraining_that_saved_as_it_ended_has_all_tokens_and_seconds(tmp_path: Path) -> None:
    fit("full", tmp_path / "straight")
    with pytest.raises(RuntimeError, match="the test says stop"):
        fit("full", tmp_path / "run", Stop(6, RuntimeError))
    report = fit("full", tmp_path / "run")
    assert report["train_tokens"] == TOKENS
    assert report["seconds"] > 5 * PAUSE
    assert report["environment"]["resumed"] is True
    assert report["environment"]["seconds_at_least"] is False
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))


@pytest.mark.slow
def test_full_retraining_that_was_killed_says_that_seconds_are_missing(tmp_path: Path) -> None:
    every = ("--checkpoint_every_n_steps=3",)
    with mock.patch.object(Checkpoints, "on_exception"), pytest.raises(Killed):
        fit("full", tmp_path / "run", Stop(4, Killed), more=every)
    report = fit("full", tmp_path / "run", more=every)
    assert report["train_tokens"] == TOKENS
    assert report["seconds"] > 3 * PAUSE
    assert report["environment"]["seconds_at_least"] is True


@pytest.mark.slow
def test_a_killed_start_without_a_checkpoint_leaves_a_mark(tmp_path: Path) -> None:
    with mock.patch.object(Checkpoints, "on_exception"), pytest.raises(Killed):
        fit("full", tmp_path / "run", Stop(1, Killed))
    report = fit("full", tmp_path / "run")
    assert report["train_tokens"] == TOKENS
    assert report["environment"]["resumed"] is False
    assert report["environment"]["seconds_at_least"] is True


@pytest.mark.slow
def test_windows_keep_tokens_and_seconds(tmp_path: Path) -> None:
    fit("block", tmp_path / "straight")
    with pytest.raises(Killed):
        fit("block", tmp_path / "run", Stop(9, Killed))  # in the second window
    with safe_open(tmp_path / "run" / "windows" / "000.safetensors", framework="pt") as file:
        written = json.loads(file.metadata()["result"])
    assert written["tokens"] == TOKENS
    assert written["seconds"] > 8 * PAUSE
    report = fit("block", tmp_path / "run")
    assert report["train_tokens"] == TOKENS
    assert report["seconds"] > written["seconds"]
    assert report["environment"]["resumed"] is True
    assert report["environment"]["seconds_at_least"] is True
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))


@pytest.mark.slow
def test_parts_that_were_killed_add_up_and_merge_says_so(tmp_path: Path) -> None:
    from recon.cli.merge import main as merge

    run = tmp_path / "run"
    fit("block", run, more=("--windows=1/2",))
    with pytest.raises(Killed):
        fit("block", run, Stop(1, Killed), more=("--windows=2/2",))
    fit("block", run, more=("--windows=2/2",))
    assert [json.loads(file.read_text())["at_least"] for file in sorted(run.glob("parts/*/part.json"))] == [False, True]
    assert merge([str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["train_tokens"] == TOKENS
    assert report["environment"]["seconds_at_least"] is True


# --- what went through a step -----------------------------------------------------------------------------


class Half(TokenData):
    """Batches of one, of the first half of the sequences."""

    def train_dataloader(self) -> DataLoader:
        rows = [{"input_ids": row} for row in self.tokens("train")[: self.num["train"] // 2]]
        return DataLoader(rows, batch_size=1)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_full_retraining_counts_the_batches_of_a_users_own_data(tmp_path: Path) -> None:
    data = data_of(num=10, seq=16)
    data.__class__ = Half
    scope = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=3), data)
    trainer_of(max_steps=7).fit(scope, datamodule=scope.fit_data(data))
    assert scope.train_tokens == 7 * 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [BlockDistillation, MatrixReconstruction])
def test_windows_count_what_they_saw_and_none_saw_nothing(kind: Any, tmp_path: Path) -> None:
    scope = prepared(kind(name=save_tiny("llama", tmp_path)), data_of(num=10, seq=16))
    trainer_of().fit(scope, datamodule=scope.fit_data(scope.data))
    assert scope.train_tokens == 10 * 16 * scope.epochs
    whole = prepared(kind(name=save_tiny("llama", tmp_path)), data_of(num=10, seq=16))
    keep = {name: mask | True for name, mask in whole.masks.items()}
    whole.prepare(whole.data, type(whole.masks)(keep))
    trainer_of().fit(whole, datamodule=whole.fit_data(whole.data))
    assert whole.train_tokens == 0
