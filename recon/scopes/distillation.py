"""Distillation of windows by gradient descent, and the two scopes that do it: submodules and blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recon.scopes.base import StartName, check_finite, warmup_and_linear_decay
from recon.scopes.local import Batch, LocalScope
from recon.windows import Window, block_windows, submodule_windows


class Distillation(LocalScope):
    """Trains each window's weights until its output matches the dense window's.

    The loss is the squared error divided by the mean energy of the window's target. One optimizer holds
    all windows' weights, but only those of the current window require gradients; its state is dropped
    when the window ends, so memory does not grow with depth.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew.
        weight_decay: AdamW's weight decay.
        betas: AdamW's averaging coefficients.
        warmup: Share of a window's steps with a rising learning rate; it falls linearly to zero afterwards.
        start: As in `Scope`. `exact` takes one forward pass over the calibration sequences and a solve of each matrix;
            on the bundled model three epochs from it reach what four from `pruned` do.
        **options: Batch size, and which model: see `LocalScope`.
    """

    def __init__(
        self,
        epochs: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.1,
        start: StartName = "exact",
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, start=start, **options)
        self.lr, self.weight_decay, self.betas, self.warmup = lr, weight_decay, betas, warmup

    def configure_optimizers(self):
        """AdamW over all windows' weights, the schedule beginning anew with each window."""
        if not self.windows:
            return []
        parameters = [self.model.get_parameter(name) for window in self.windows for name in window.owned]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        steps_in_all = int(self.trainer.estimated_stepping_batches)  # an epoch's last batches make a step, however few
        steps = self.epochs * steps_in_all // max(1, self.max_epochs)
        return {
            "optimizer": optimizer,
            "lr_scheduler": warmup_and_linear_decay(optimizer, steps, self.warmup, period=steps),
        }

    def begin(self, window: Window) -> None:
        """As `LocalScope.begin`; unfreezes the window."""
        super().begin(window)
        for name in window.owned:
            self.model.get_parameter(name).requires_grad_(True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Squared error relative to the energy of the batch's target."""
        assert self.window is not None
        error, energy = self.squared_error(batch)
        loss = error / energy
        check_finite(loss, f"window {self.window.name}, epoch {self._epoch}, batch {batch_idx}")
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["hidden"]))
        return loss

    def end(self, window: Window) -> dict[str, Any]:
        """Freeze the window and drop gradients and optimizer state."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        for name in window.owned:
            parameter = self.model.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None
            optimizer.state.pop(parameter, None)  # pyright: ignore[reportAttributeAccessIssue]
        return {}


class SubmoduleDistillation(Distillation):
    """Recovers every attention and every MLP submodule by itself.

    An attention window ends where the attention submodule returns; an MLP window is the block with its
    attention output given.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew.
        **options: More of the training, batch size, and which model: see `Distillation` and `LocalScope`.
    """

    scope = "submodule"

    def __init__(self, epochs: int = 4, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(epochs=epochs, lr=lr, **options)

    def build_windows(self) -> Sequence[Window]:
        """Attention and MLP of every block."""
        return submodule_windows(self.replay)


class BlockDistillation(Distillation):
    """Recovers one or more consecutive blocks at a time.

    Args:
        num_blocks: Blocks a window; the last window is shorter if the depth is no multiple of it.
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew.
        **options: More of the training, batch size, and which model: see `Distillation` and `LocalScope`.
    """

    scope = "block"

    def __init__(self, num_blocks: int = 1, epochs: int = 4, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(epochs=epochs, lr=lr, **options)
        if num_blocks < 1:
            raise ValueError(f"model.num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks

    @property
    def label(self) -> str:
        """Says how many blocks a window holds, if more than one."""
        return "block" if self.num_blocks == 1 else f"block x{self.num_blocks}"

    def build_windows(self) -> Sequence[Window]:
        """Consecutive blocks."""
        return block_windows(self.replay.anatomy, self.num_blocks)
