"""Distillation of windows by gradient descent, and the two scopes that do it: submodules and blocks."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from recon.calibration.statistics import InputStatistics
from recon.models.anatomy import Anatomy
from recon.models.linear import as_out_in, weight_out_in
from recon.models.windows import (
    Window,
    Windows,
    block_windows,
    group_windows,
    require_groups,
    submodule_windows,
)
from recon.scopes.base import StartName
from recon.scopes.exact import solve
from recon.scopes.local.batches import Batch
from recon.scopes.local.module import LocalScope
from recon.scopes.local.schedule import require_dense_inputs, require_owners, require_propagation
from recon.scopes.local.window_error import outputs
from recon.scopes.local.window_state import compiled
from recon.scopes.lora import DEFAULT_LORA, Lora, attach, merge
from recon.scopes.losses import WindowLoss, window_loss
from recon.scopes.optimization import require_rates, warmup_and_linear_decay
from recon.scopes.trainable import Parameters, chosen


class Distillation(LocalScope):
    """Trains each window's weights until its output matches its target.

    One optimizer serves all windows in turn: it holds the parameters of the current one, and its state is dropped
    when the window ends, so memory does not grow with depth.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        loss: `normalised`, the squared error over the energy of the batch's target; `mse`, the mean squared error;
            `cosine`, one minus the cosine between output and target, mean over tokens.
        parameters: Parameters that learn in a window: `all`; `weights`, matrices of linear maps; `vectors`, norms and
            biases; `lora`, low-rank updates of the pruned matrices, merged into them when the window ends.
        lora: Rank and alpha of these updates.
        lr: Peak learning rate of AdamW, for each window anew.
        weight_decay: AdamW's weight decay.
        betas: AdamW's averaging coefficients.
        warmup: Share of a window's steps with a rising learning rate; it falls linearly to zero afterwards.
        start: As in `Scope`. `exact` takes a solve of each matrix on the inputs of its window; on the bundled
            model three epochs from it reach what four from `pruned` do.
        compile: Whether to train with torch.compile: a wait once, then faster steps; last digits differ.
        **options: Batch size, and which model: see `LocalScope`.
    """

    def __init__(
        self,
        epochs: int = 4,
        loss: WindowLoss = "normalised",
        parameters: Parameters = "all",
        lora: Lora = DEFAULT_LORA,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.1,
        start: StartName = "exact",
        compile: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, start=start, **options)
        require_rates(lr, weight_decay, betas, warmup)
        self.loss: WindowLoss = loss
        self.which_parameters: Parameters = parameters
        self.lora = lora
        self.lr, self.weight_decay, self.betas, self.warmup = lr, weight_decay, betas, warmup
        self._adapters: list[str] = []
        self.compiles, self._compiled = compile, ExitStack()

    def label_notes(self) -> list[str]:
        """As `LocalScope.label_notes`, with loss and parameters."""
        notes = [] if self.loss == "normalised" else [self.loss]
        return super().label_notes() + notes + ([] if self.which_parameters == "all" else [self.which_parameters])

    def configure_optimizers(self):
        """Make AdamW, with a schedule that begins anew with each window."""
        if not self.windows:
            return []
        first = self.model.get_parameter(self.windows[0].owned[0])  # in place of a window's, until one begins
        optimizer = torch.optim.AdamW([first], lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        steps_in_all = int(self.trainer.estimated_stepping_batches)  # an epoch's last batches make a step, however few
        steps = self.epochs * steps_in_all // max(1, self.max_epochs)
        return {
            "optimizer": optimizer,
            "lr_scheduler": warmup_and_linear_decay(optimizer, steps, self.warmup, period=steps),
        }

    @torch.no_grad()
    def observe(self, statistics: dict[str, InputStatistics]) -> None:
        """Solve each matrix for the weights that it starts from."""
        for name, found in statistics.items():
            module = self.model.get_submodule(name.removesuffix(".weight"))
            dense = weight_out_in(module)
            solution = solve(module, dense, found, self.masks[name], name)
            self.block_masks.starts[name] = as_out_in(module, solution.weight).to(dense.dtype)

    def begin(self, window: Window) -> None:
        """As `LocalScope.begin`; the parameters that learn require gradients from now on."""
        super().begin(window)
        names = self.trained(window)
        if self.which_parameters == "lora":
            self._adapters = attach(self.model, self.masks, window.owned, self.lora, self.data.seed)
            names = self._adapters
        self.learn(names)
        if self.compiles:
            self._compiled = compiled(window.blocks)

    def trained(self, window: Window) -> list[str]:
        """Names of the parameters of `window` that learn; those that adapters are merged into where these learn."""
        if self.which_parameters == "lora":
            return super().trained(window)
        parameters = {name: self.model.get_parameter(name) for name in window.owned}
        matrices = {f"{name}.weight" for block in window.blocks for name in block.matrices}
        return chosen(parameters, matrices, self.which_parameters, f"window {window.name}")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the window's output against its target."""
        assert self.under_way is not None
        window = self.under_way.window
        self.under_way.tokens += batch["hidden"].shape[:2].numel()
        output, target = outputs(self.replay, window, batch)
        loss = window_loss(output, target, self.loss)
        where = f"window {window.name}, epoch {self.under_way.epoch}, batch {batch_idx}"
        self.log_loss("loss", loss, where, prog_bar=True, batch_size=len(batch["hidden"]))
        return loss

    def end(self, window: Window) -> dict[str, Any]:
        """Freeze the window, merge its adapters, drop gradients, optimizer state and compiled code."""
        self.rest()
        self._compiled.close()
        merge(self.model, self._adapters)
        self._adapters = []
        return window.facts


class SubmoduleDistillation(Distillation):
    """Recovers every attention and every MLP submodule by itself, or other groups of a block's matrices.

    An attention window ends where the attention submodule returns; an MLP window is the block with its
    attention output given.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew.
        windows: Groups of matrices by patterns of their names, in place of attention and MLP. A group learns to
            return what it does in the dense block, at those of its matrices that no other of them reads; norms
            stay as they are.
        **options: More of the training, batch size, and which model: see `Distillation` and `LocalScope`.
    """

    scope = "submodule"

    def __init__(self, epochs: int = 4, lr: float = 1e-3, windows: Windows | None = None, **options: Any) -> None:
        super().__init__(epochs=epochs, lr=lr, **options)
        if self.compiles and windows is not None:
            raise ValueError(
                "model.windows watches single matrices, which compiled code hides, got model.compile: true; leave out "
                "one of the two"
            )
        self.groups = windows and windows.groups
        if self.groups is not None:
            require_dense_inputs(self.propagation)
        self.taps = self.groups is None

    def label_notes(self) -> list[str]:
        """As `Distillation.label_notes`, with the number of groups."""
        return super().label_notes() + ([] if self.groups is None else [f"{len(self.groups)} groups"])

    def require_model(self, anatomy: Anatomy, pruned: Collection[str]) -> None:
        """As `Scope.require_model`; groups have to fit the model and to hold all that is pruned."""
        if self.groups is not None:
            grouped = require_groups(anatomy, self.groups)
            require_owners({f"{name}.weight" for name in grouped}, pruned)

    def build_windows(self) -> Sequence[Window]:
        """Lay out attention and MLP of every block, or the groups."""
        return submodule_windows(self.replay) if self.groups is None else group_windows(self.replay, self.groups)


class BlockDistillation(Distillation):
    """Recovers one or more consecutive blocks at a time.

    Args:
        num_blocks: Blocks a window; the last window is shorter if the depth is no multiple of it.
        stride: Blocks from one window's start to the next one's; num_blocks if null. If it is smaller, windows overlap,
            and the blocks that two of them share are trained again, from the weights that the first left.
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew.
        **options: More of the training, batch size, and which model: see `Distillation` and `LocalScope`.
    """

    scope = "block"

    def __init__(
        self, num_blocks: int = 1, stride: int | None = None, epochs: int = 4, lr: float = 1e-3, **options: Any
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **options)
        if num_blocks < 1:
            raise ValueError(f"model.num_blocks must be at least 1, got {num_blocks}")
        if stride is not None and not 1 <= stride <= num_blocks:
            raise ValueError(
                f"model.stride must be at least 1 and at most model.num_blocks ({num_blocks}), got {stride}: every "
                f"block needs a window"
            )
        self.num_blocks, self.stride = num_blocks, stride

    def require_independent(self, what: str) -> None:
        """As `LocalScope.require_independent`; refuses overlapping windows, too."""
        super().require_independent(what)
        if self.stride not in (None, self.num_blocks):
            raise ValueError(
                f"{what} needs windows that do not depend on each other, got model.stride {self.stride} of "
                f"{self.num_blocks} blocks, with which they overlap; choose model.stride: null"
            )

    @property
    def label_stem(self) -> str:
        """Name of the scope, with the number of blocks in a window if it is more than one."""
        return "block" if self.num_blocks == 1 else f"block x{self.num_blocks}"

    def label_notes(self) -> list[str]:
        """As `Distillation.label_notes`, with the stride."""
        return ([] if self.stride in (None, self.num_blocks) else [f"stride {self.stride}"]) + super().label_notes()

    def require_model(self, anatomy: Anatomy, pruned: Collection[str]) -> None:
        """As `Scope.require_model`; a window must not be larger than the model."""
        if self.num_blocks > len(anatomy.blocks):
            raise ValueError(
                f"model.num_blocks must be at most {len(anatomy.blocks)}, the blocks of the model, got "
                f"{self.num_blocks}; give --model.num_blocks {len(anatomy.blocks)} for one window over all"
            )
        require_propagation(block_windows(anatomy, self.num_blocks, self.stride), self.propagation)

    def build_windows(self) -> Sequence[Window]:
        """Lay out windows of consecutive blocks."""
        return block_windows(self.replay.anatomy, self.num_blocks, self.stride)
