"""Fits of every kind of scope on a tiny model, watched or killed on the way."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

from callbacks import MaskEnforcer
from recon.pruning.masks import Masks
from recon.scopes import (
    BlockDistillation,
    FullRetraining,
    MatrixReconstruction,
    Scope,
    SubmoduleDistillation,
)
from recon.scopes.local.module import LocalScope
from tests.support.families import DEPTH
from tests.support.scope_fixtures import (
    trainer_of,
    weights_of,
)

RESUMED = "ignore:Checkpoint directory .* exists and is not empty"

EPOCHS, BATCHES, STEPS = 2, 3, 6  # 10 sequences, 4 a batch
DISTILLED = {"epochs": EPOCHS, "lr": 3e-3, "batch_size": 4, "start": "pruned"}
LOCAL: dict[str, Callable[..., LocalScope]] = {
    "matrix": lambda **o: MatrixReconstruction(batch_size=4, **o),
    "submodule": lambda **o: SubmoduleDistillation(**{**DISTILLED, **o}),
    "block": lambda **o: BlockDistillation(**{**DISTILLED, **o}),
    "two blocks": lambda **o: BlockDistillation(num_blocks=2, **{**DISTILLED, **o}),
}
SCOPES: dict[str, Callable[..., Scope]] = {
    **LOCAL,
    "full": lambda **o: FullRetraining(**{"epochs": EPOCHS, "lr": 3e-3, **o}),
    "full distillation": lambda **o: FullRetraining(loss="distillation", **{"epochs": EPOCHS, "lr": 3e-3, **o}),
}
BLOCK_NAMES = [f"{index:03d}" for index in range(DEPTH)]
WINDOWS = {
    "matrix": BLOCK_NAMES,
    "submodule": [f"{block}.{part}" for block in BLOCK_NAMES for part in ("attention", "mlp")],
    "block": BLOCK_NAMES,
    "two blocks": ["000-001", "002"],
}


class Spy(Callback):
    """Notes what a fit does, step by step."""

    def __init__(self) -> None:
        self.windows: list[str] = []
        self.learning: list[set[str]] = []
        self.rates: list[float] = []
        self.seen: list[Tensor] = []
        self.num_states: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Scope)
        self.learning.append({name for name, p in pl_module.model.named_parameters() if p.requires_grad})
        if isinstance(pl_module, LocalScope):
            assert pl_module.window is not None
            self.windows.append(pl_module.window.name)
        if isinstance(batch, dict):
            self.seen.append(next(iter(batch.values())).detach().clone())
        if trainer.optimizers:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.optimizers:
            self.num_states.append(len(trainer.optimizers[0].state))


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a fit at a step of a window."""

    def __init__(self, window: str, step: int) -> None:
        self.window, self.steps_left = window, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps_left -= pl_module.window.name == self.window
        if self.steps_left == 0:
            raise Killed


def fit(scope: Scope, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> dict[str, Tensor]:
    """Fit with masks enforced; return the weights."""
    trainer = trainer_of(MaskEnforcer(), *callbacks, **options)
    trainer.fit(scope, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return weights_of(scope.model)


def pruned_of(model: PreTrainedModel, masks: Masks) -> PreTrainedModel:
    with torch.no_grad():
        for name, keep in masks.items():
            model.get_parameter(name).masked_fill_(~keep, 0)
    return model


def assert_masks_exact(weights: dict[str, Tensor], masks: Masks) -> None:
    for name, keep in masks.items():
        assert int((weights[name][~keep] != 0).sum()) == 0, name
        assert int((weights[name][keep] == 0).sum()) == 0, name
