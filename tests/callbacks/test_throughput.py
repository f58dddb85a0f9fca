import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from callbacks import MaskEnforcer
from callbacks.flops import flops_per_token
from callbacks.throughput import Throughput, _dtype
from recon.scopes import (
    BlockDistillation,
    FullRetraining,
    MatrixReconstruction,
    Pretraining,
    Scope,
    SubmoduleDistillation,
)
from tests.support.scope_fixtures import IGNORED, data_of, prepared, save_tiny, trainer_of

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

SEQ, BATCH, PEAK = 16, 4, 1e6


class Clock(Callback):
    """A training batch takes a second, a held-out batch a hundred, the end of an epoch a thousand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.read = 0
        monkeypatch.setattr("callbacks.throughput.time", SimpleNamespace(perf_counter=self))

    def __call__(self) -> float:
        self.read += 1
        return self.now

    def on_train_batch_start(self, *args: Any) -> None:
        self.now += 0.25  # the clock comes before Throughput, so only what follows counts after a pause

    def on_train_batch_end(self, *args: Any) -> None:
        self.now += 1.0

    def on_validation_batch_end(self, *args: Any) -> None:
        self.now += 100.0

    def on_train_epoch_start(self, *args: Any) -> None:
        self.now += 1000.0


class Lines(CSVLogger):
    """What was logged of the throughput, by step."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lines: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:  # type: ignore[override]
        kept = {name: value for name, value in metrics.items() if name.startswith("throughput")}
        if kept:
            assert step is not None
            assert step not in self.lines
            self.lines[step] = kept
        super().log_metrics(metrics, step)


def full(path: Path, **options: Any) -> FullRetraining:
    """Twelve sequences in batches of four: three batches per epoch."""
    return prepared(FullRetraining(name=save_tiny("llama", path), **{"epochs": 2, **options}), data_of(num=12))


def fit(scope: Scope, path: Path, clock: Clock, throughput: Throughput, **options: Any) -> dict[int, dict[str, float]]:
    trainer = trainer_of(MaskEnforcer(), clock, throughput, **options)
    logger = Lines(path)
    trainer.loggers = [logger]
    trainer.fit(scope)
    return logger.lines


def test_rates_of_each_window_and_of_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, scope = Throughput(window=2, peak_flops=PEAK), full(tmp_path)
    lines = fit(scope, tmp_path, Clock(monkeypatch), throughput)
    # Six steps. The clock starts after the first one; between the epochs it stands still until a batch begins.
    seconds = {2: 1.25 + 1.25, 4: 1.0 + 1.25, 5: 1.25}
    tokens = {2: 2 * BATCH * SEQ, 4: 2 * BATCH * SEQ, 5: BATCH * SEQ}
    flops = flops_per_token(scope.model, SEQ)
    for step in seconds:
        rate = tokens[step] / seconds[step]
        expected = {"throughput/tokens_per_second": rate, "throughput/mfu": rate * flops / PEAK}
        assert lines[step] == pytest.approx(expected)
    assert lines.keys() == seconds.keys()
    rate = 5 * BATCH * SEQ / 6.0
    expected = {"tokens": 5 * BATCH * SEQ, "seconds": 6.0, "tokens_per_second": rate, "mfu": rate * flops / PEAK}
    assert throughput.summary() == pytest.approx(expected)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_every_micro_batch_counts_and_windows_are_optimizer_steps(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput, clock, epochs = Throughput(window=1), Clock(monkeypatch), 4
    lines = fit(full(tmp_path, epochs=epochs), tmp_path, clock, throughput, accumulate_grad_batches=accumulate)
    steps = epochs * -(-3 // accumulate)  # the last step of an epoch takes the batches that are left
    assert list(lines) == list(range(1, steps))
    assert throughput.summary()["tokens"] == (epochs * 3 - accumulate) * BATCH * SEQ


def test_validation_within_an_epoch_takes_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(window=100)
    fit(full(tmp_path), tmp_path, Clock(monkeypatch), throughput, val_check_interval=1)
    assert throughput.summary() == {
        "tokens": 5 * BATCH * SEQ,
        "seconds": 5.0,
        "tokens_per_second": BATCH * SEQ,
        "mfu": None,
    }


def test_the_device_is_waited_for_once_per_window_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    fit(full(tmp_path, epochs=20), tmp_path, clock, Throughput(window=30), limit_val_batches=0)
    stopped_or_started = 2 * 20 - 1  # by the ends and beginnings of the epochs: the first begins before the clock
    assert clock.read <= stopped_or_started + 1 + 2 * 2


def test_without_an_mfu_the_rate_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput()
    lines = fit(full(tmp_path), tmp_path, Clock(monkeypatch), throughput)
    assert [list(line) for line in lines.values()] == [["throughput/tokens_per_second"]]  # the window never fills
    assert throughput.summary()["mfu"] is None


def test_without_a_logger_there_is_a_summary(tmp_path: Path) -> None:
    throughput = Throughput(window=2, peak_flops=PEAK)
    trainer = trainer_of(MaskEnforcer(), throughput)
    trainer.fit(full(tmp_path))
    summary = throughput.summary()
    assert summary["tokens"] == 5 * BATCH * SEQ
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])  # type: ignore
    assert not any("throughput" in name for name in trainer.callback_metrics)  # Progress prints these


def test_one_step_is_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(window=1, peak_flops=PEAK)
    lines = fit(full(tmp_path, epochs=1), tmp_path, Clock(monkeypatch), throughput, limit_train_batches=1)
    assert lines == {}
    assert throughput.summary() == {"tokens": 0, "seconds": 0, "tokens_per_second": None, "mfu": None}


def test_a_resumed_fit_measures_what_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer_of(MaskEnforcer())
    first.fit(full(tmp_path, epochs=1))
    first.save_checkpoint(tmp_path / "first.ckpt")
    throughput, logger = Throughput(window=1), Lines(tmp_path)
    trainer = trainer_of(MaskEnforcer(), Clock(monkeypatch), throughput)
    trainer.loggers = [logger]
    trainer.fit(full(tmp_path), ckpt_path=tmp_path / "first.ckpt", weights_only=False)
    assert list(logger.lines) == [4, 5]
    assert throughput.summary()["tokens"] == 2 * BATCH * SEQ


def test_the_teacher_of_distillation_counts_its_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, scope = Throughput(peak_flops=PEAK), full(tmp_path, loss="distillation")
    fit(scope, tmp_path, Clock(monkeypatch), throughput)
    flops = flops_per_token(scope.model, SEQ) + flops_per_token(scope.model, SEQ, backward=False)
    rate = throughput.summary()["tokens_per_second"]
    assert throughput.summary()["mfu"] == pytest.approx(rate * flops / PEAK)  # type: ignore[operator]


def test_pretraining_is_full_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = full(tmp_path)
    scope = Pretraining(shape={"model_type": "llama"}, epochs=2)
    scope.model, data = trained.model, data_of(num=12)
    scope.prepare(data, trained.masks)
    assert fit(scope, tmp_path, Clock(monkeypatch), Throughput(window=5)).keys() == {5}


@pytest.mark.parametrize("kind", [BlockDistillation, SubmoduleDistillation, MatrixReconstruction])
def test_in_local_scopes_nothing_happens(kind: type[Scope], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, throughput = Clock(monkeypatch), Throughput(window=1, peak_flops=PEAK)
    fit(full(tmp_path), tmp_path, clock, throughput)  # and nothing is left of an earlier fit
    clock.read = 0
    scope = prepared(kind(name=save_tiny("llama", tmp_path), batch_size=4))
    assert fit(scope, tmp_path / "local", clock, throughput) == {}
    assert clock.read == 0
    assert set(throughput.summary().values()) == {0.0, None}


@pytest.mark.parametrize(
    ("precision", "stored", "dtype"),
    [
        ("32-true", "float32", torch.float32),
        ("32-true", "bfloat16", torch.bfloat16),
        ("bf16-true", "float32", torch.bfloat16),
        ("bf16-mixed", "float32", torch.bfloat16),
    ],
)
def test_the_peak_is_that_of_the_precision_of_the_products(
    precision: str, stored: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert _dtype(trainer_of(precision=precision), full(tmp_path, dtype=stored)) == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "at least 1 optimizer step, got 0"),
        ({"peak_flops": 0.0}, "positive FLOP/s of one device, got 0.0"),
    ],
)
def test_options_that_measure_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Throughput(**options)


class Summary(Callback):
    """Writes the summary of each rank, which ends with its process."""

    def __init__(self, throughput: Throughput, path: Path) -> None:
        self.throughput, self.path = throughput, path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.path / f"{trainer.global_rank}.json").write_text(json.dumps(self.throughput.summary()))


@pytest.mark.slow
def test_two_ranks_are_counted_and_told_apart(tmp_path: Path) -> None:
    throughput = Throughput(window=2, peak_flops=PEAK)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="spawn", process_group_backend="gloo"),
        logger=CSVLogger(tmp_path, name="", version="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        max_epochs=-1,
        log_every_n_steps=1,
        callbacks=[MaskEnforcer(), throughput, Summary(throughput, tmp_path)],
    )
    scope = full(tmp_path)  # six sequences per rank and epoch: batches of four and two
    trainer.fit(scope)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["tokens"] == 2 * (2 + 4 + 2) * SEQ  # ranks times sequences after the first step
    flops = flops_per_token(scope.model, SEQ)
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * flops / (2 * PEAK))
    lines = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["throughput/tokens_per_second"]]
    assert [row["step"] for row in rows] == ["2", "3"]
    for row in rows:
        rates = [float(row[f"throughput/rank{rank}/tokens_per_second"]) for rank in range(2)]
        assert float(row["throughput/tokens_per_second"]) == pytest.approx(2 * min(rates))
        mfus = [float(row[f"throughput/rank{rank}/mfu"]) for rank in range(2)]
        assert mfus == pytest.approx([rate * flops / PEAK for rate in rates])
