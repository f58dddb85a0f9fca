"""Numbers that are none, losses that diverge, and options out of range."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from callbacks import MaskEnforcer
from recon.scopes import (
    BlockDistillation,
    MatrixReconstruction,
    SubmoduleDistillation,
)
from tests.support.families import DEPTH
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    random_masks,
    save_tiny,
    trainer_of,
)
from tests.support.scope_runs import LOCAL, RESUMED, SCOPES, fit

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in (*IGNORED, RESUMED))]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("matrix", r"`model\.layers\.1\.mlp\.down_proj\.weight`|after block 1"),
        ("submodule", "after block 1 in the batch that begins with sequence 0"),
        ("block", "after block 1 in the batch that begins with sequence 0"),
        ("full", "full retraining, step 0, batch 0"),
    ],
)
def test_a_weight_that_is_no_number_stops_the_run(kind: str, where: str, tmp_path: Path) -> None:
    scope = prepared(SCOPES[kind](name=save_tiny("llama", tmp_path)))
    with torch.no_grad():
        weight = scope.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        weight.masked_fill_(scope.masks["model.layers.1.mlp.down_proj.weight"], float("nan"))
    with pytest.raises((FloatingPointError, ValueError), match=where):
        fit(scope)


@pytest.mark.parametrize("kind", ["matrix", "submodule"])
def test_hidden_states_that_overflow_name_block_and_batch(kind: str, tmp_path: Path) -> None:
    scope = LOCAL[kind](name=save_tiny("gpt2", tmp_path))
    scope.load(data := data_of())
    data.tokens("train").masked_fill_(data.tokens("train") == 95, 94)
    data.tokens("validation").masked_fill_(data.tokens("validation") == 95, 94)
    data.tokens("train")[5, 3] = 95
    scope.prepare(data, random_masks(scope.model))
    with torch.no_grad():
        scope.model.get_parameter("transformer.wte.weight")[95] = 3e38  # LayerNorm squares it
    with pytest.raises((FloatingPointError, ValueError), match=r"begins with sequence 4|in batch 1 \(counted from 0\)"):
        fit(scope)


@pytest.mark.parametrize(
    ("kind", "where"),
    [("submodule", r"window 000\.attention, epoch 1, batch 1"), ("full", "full retraining, step 1, batch 1")],
)
def test_a_diverging_loss_names_window_and_batch(kind: str, where: str, tmp_path: Path) -> None:
    scope = prepared(SCOPES[kind](name=save_tiny("gpt2", tmp_path), lr=1e30), directory=tmp_path)
    with pytest.raises(FloatingPointError, match=where):
        fit(scope)
    assert not (tmp_path / "windows").exists()


def test_losses_are_looked_at_when_they_are_logged_and_at_an_epochs_end(tmp_path: Path) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []
            self.logged: dict[int, float] = {}

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.seen.append(float(outputs["loss"]))

    class Lines(CSVLogger):
        def log_metrics(self, metrics: dict, step: int | None = None) -> None:  # type: ignore[override]
            if "loss" in metrics:
                assert step is not None
                losses.logged[step] = metrics["loss"]

    def fit_logged(**options: Any) -> None:
        scope = prepared(LOCAL["block"](name=name, epochs=1, batch_size=1, **options), directory=tmp_path)
        trainer = trainer_of(MaskEnforcer(), losses, log_every_n_steps=4)
        trainer.loggers = [Lines(tmp_path)]
        trainer.fit(scope)

    name, losses = save_tiny("gpt2", tmp_path), Losses()
    fit_logged()
    assert len(losses.seen) == 10 * DEPTH
    assert losses.logged == {step: losses.seen[step] for step in range(3, 10 * DEPTH, 4)}

    for file in (tmp_path / "windows").iterdir():
        file.unlink()
    losses = Losses()
    with pytest.raises(FloatingPointError, match=r"got nan in window 000, epoch 1, batch 1;"):
        fit_logged(lr=1e30)
    assert len(losses.seen) == 3  # the fourth is asked for all
    assert not any((tmp_path / "windows").iterdir())


@pytest.mark.parametrize(
    ("kind", "where"),
    [("block", "window 000, held-out batch that begins with sequence 0"), ("full", "held-out batch 0")],
)
def test_the_last_step_is_watched_too(kind: str, where: str, tmp_path: Path) -> None:
    data = data_of(num=4)  # one step
    scope = prepared(SCOPES[kind](name=save_tiny("gpt2", tmp_path), lr=1e30, epochs=1), data, tmp_path)
    with pytest.raises(FloatingPointError, match=where):
        fit(scope)
    assert not (tmp_path / "windows").exists()


@pytest.mark.parametrize(
    ("kind", "options", "option"),
    [
        ("submodule", {"epochs": 0}, "model.epochs"),
        ("matrix", {"batch_size": 0}, "model.batch_size"),
        ("block", {"num_blocks": 0}, "model.num_blocks"),
    ],
)
def test_options_out_of_range_are_named(kind: str, options: dict, option: str) -> None:
    classes = {"submodule": SubmoduleDistillation, "matrix": MatrixReconstruction, "block": BlockDistillation}
    with pytest.raises(ValueError, match=option):
        classes[kind](**options)
