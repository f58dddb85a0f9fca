"""Every option of Lightning's trainer is honoured or refused before anything is loaded."""

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.scopes.trainer_options import EVERYWHERE, IN_WINDOWS, NO_ACCUMULATION, NO_OPTIMIZER
from recon.solvers import GradientDescent
from tests.support.scope_fixtures import IGNORED, prepared, save_tiny, trainer_of, weights_of
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

SCOPES: dict[str, Any] = {
    "matrix": lambda **model: MatrixReconstruction(batch_size=4, **model),
    "matrix by descent": lambda **model: MatrixReconstruction(batch_size=4, solver=GradientDescent(steps=3), **model),
    "submodule": lambda **model: SubmoduleDistillation(epochs=1, batch_size=4, **model),
    "block": lambda **model: BlockDistillation(epochs=1, batch_size=4, **model),
    "full": lambda **model: FullRetraining(epochs=1, **model),
}
LOCAL = ("matrix", "submodule", "block", "matrix by descent")

REFUSED: list[tuple[str, Any, tuple[str, ...]]] = [
    *((name, value, tuple(SCOPES)) for name, value in [
        ("fast_dev_run", True), ("fast_dev_run", 3), ("max_epochs", 7), ("min_epochs", 2), ("min_steps", 5),
        ("max_time", "00:01:00:00"), ("overfit_batches", 1), ("overfit_batches", 0.5), ("limit_test_batches", 1),
        ("limit_predict_batches", 0.5), ("inference_mode", False), ("sync_batchnorm", True), ("model_registry", "x"),
        ("gradient_clip_algorithm", "value"),
    ]),
    *((name, value, LOCAL) for name, value in [
        ("max_steps", 7), ("limit_train_batches", 1), ("limit_train_batches", 0.5), ("limit_val_batches", 0),
        ("val_check_interval", 1), ("val_check_interval", "00:00:01:00"), ("check_val_every_n_epoch", 2),
        ("num_sanity_val_steps", 1), ("use_distributed_sampler", False), ("callbacks", EarlyStopping("loss")),
    ]),
    ("accumulate_grad_batches", 2, ("matrix", "matrix by descent")),
    ("gradient_clip_val", 1.0, ("matrix",)),
]  # fmt: skip
"""Option, value, and the scopes that refuse it; the others honour it."""

HONOURED: dict[str, Any] = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": "bf16-mixed",
    "logger": False,
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": True,
    "enable_model_summary": True,
    "deterministic": True,
    "benchmark": False,
    "profiler": "simple",
    "detect_anomaly": True,
    "plugins": [],
    "reload_dataloaders_every_n_epochs": 1,
    "enable_autolog_hparams": False,
}
"""An option that no scope refuses, and a value."""

ELSEWHERE = {"barebones", "default_root_dir"}
"""Lightning refuses the first beside base.yaml's options, the command the second."""


def test_none_is_forgotten() -> None:
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    refused = {option.name for option in EVERYWHERE + IN_WINDOWS + NO_ACCUMULATION + NO_OPTIMIZER}
    assert {name for name, _, _ in REFUSED} | {"barebones"} == refused
    assert arguments == refused | HONOURED.keys() | ELSEWHERE


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("name", "value", "refusing"), REFUSED)
def test_refused_before_loading_or_not_at_all(name: str, value: Any, refusing: tuple[str, ...], scope: str) -> None:
    trainer = trainer_of(value) if name == "callbacks" else trainer_of(**{name: value})
    built: Scope = SCOPES[scope](name="nowhere")  # which no model is loaded for
    if scope in refusing:
        with pytest.raises(ValueError, match=rf"the {built.scope} scope does not take trainer\.{name}, got .*: "):
            built.require_trainer(trainer)
    else:
        built.require_trainer(trainer)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_trainers_own_defaults_are_taken(scope: str) -> None:
    SCOPES[scope](name="nowhere").require_trainer(L.Trainer(accelerator="cpu", devices=1, logger=False))


def test_a_timer_among_the_callbacks_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"does not take trainer\.max_time, got Timer"):
        SCOPES["full"](name="nowhere").require_trainer(trainer_of(Timer(timedelta(hours=1))))


@pytest.mark.parametrize("scope", [slow("matrix"), "submodule", "full"])
@pytest.mark.parametrize("name", [name for name in HONOURED if name not in ("accelerator", "devices", "logger")])
@pytest.mark.filterwarnings("ignore:You have overridden|.*is deprecated")
def test_honoured_without_complaint(name: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(**{name: HONOURED[name]})
    built = SCOPES[scope](name=save_tiny("llama", tmp_path))
    built.require_trainer(trainer)
    dense = weights_of(prepared(built).model)
    trainer.fit(built, datamodule=built.fit_data(built.data))
    assert built.masks.violations(built.model) == 0
    assert any((weight != dense[name]).any() for name, weight in weights_of(built.model).items())


class Validations(Callback):
    """At which batches validation began, and how many batches it had."""

    def __init__(self) -> None:
        self.at: list[int] = []
        self.batches = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.at.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_validation_batch_end(self, *_: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize(
    ("options", "at", "batches", "tokens"),
    [
        ({}, [3, 6], 4, 20 * 16),
        ({"limit_train_batches": 2}, [2, 4], 4, 16 * 16),
        ({"max_steps": 4}, [3, 4], 4, 14 * 16),  # the last step may be the best
        ({"max_steps": 2, "accumulate_grad_batches": 2}, [3], 2, 10 * 16),
        ({"limit_val_batches": 1}, [3, 6], 2, 20 * 16),
        ({"val_check_interval": 2}, [2, 5], 4, 20 * 16),
        ({"check_val_every_n_epoch": 2}, [6], 2, 20 * 16),
        ({"num_sanity_val_steps": 1}, [0, 3, 6], 5, 20 * 16),
    ],
)
def test_full_retraining_honours_limits_and_counts_what_it_trained_on(
    options: dict[str, Any], at: list[int], batches: int, tokens: int, tmp_path: Path
) -> None:
    seen = Validations()
    scope = prepared(
        FullRetraining(name=save_tiny("llama", tmp_path), epochs=2)
    )  # three batches an epoch, ten sequences
    trainer = trainer_of(seen, **options)
    scope.require_trainer(trainer)
    assert scope.train_tokens == 0
    trainer.fit(scope, datamodule=scope.fit_data(scope.data))
    assert (seen.at, seen.batches, scope.train_tokens) == (at, batches, tokens)
