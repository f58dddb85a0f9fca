"""Pruned weights stay exactly zero while the others learn."""

from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from recon.scopes.base import Scope

ZERO_KEEPING = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RMSprop,
    torch.optim.Adafactor,
)
"""Optimizers for which zero weight, gradient and state stay zero, weight decay included."""


class MaskEnforcer(Callback):
    """Masks the gradients of pruned weights, which start at zero; no step then moves them.

    With weight, gradient and optimizer state zero from the first step, SGD, Adam(W), NAdam, RMSprop and
    Adafactor keep exact zeros, and a sharded optimizer's fp32 copy stays as exact as the working copy.
    Zeroing the weights after each step would leave that copy to drift.

    Checks the masks that hold when training starts and when it ends, and names the first weight that
    violates one.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scope = _scope(pl_module)
        for optimizer in trainer.optimizers if scope.automatic_optimization else ():
            if not isinstance(optimizer, ZERO_KEEPING):
                raise ValueError(
                    f"MaskEnforcer needs an optimizer that keeps zeros at zero "
                    f"({', '.join(one.__name__ for one in ZERO_KEEPING)}), got {type(optimizer).__name__}"
                )
        self._detach()
        parameters = dict(scope.model.named_parameters(remove_duplicate=False))
        for name, keep in scope.masks.items():
            parameter = parameters[name]
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)  # a hook is accepted only then; local scopes unfreeze later
            self._handles.append(parameter.register_hook(_masking(keep)))
            parameter.requires_grad_(not frozen)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scope = _scope(pl_module)
        scope.enforced().check(scope.model)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scope = _scope(pl_module)
        scope.enforced().check(scope.model)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _scope(module: L.LightningModule) -> Scope:
    if not isinstance(module, Scope):
        raise ValueError(f"MaskEnforcer needs one of recon's scopes, got {type(module).__name__}")
    return module


def _masking(keep: Tensor) -> Callable[[Tensor], Tensor]:
    """A gradient hook; the mask goes to the gradient's device at its first call, which on the host copies nothing."""
    on_device: dict[torch.device, Tensor] = {}

    def hook(gradient: Tensor) -> Tensor:
        if gradient.device not in on_device:
            on_device[gradient.device] = keep.to(gradient.device)
        return torch.where(on_device[gradient.device], gradient, 0)  # not a product: inf * 0 is nan

    return hook
