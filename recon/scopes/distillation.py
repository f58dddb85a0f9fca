"""Distillation of windows by gradient descent, and the two scopes that do it: submodules and blocks."""

import logging
import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from recon.basics.files import read_json, write_json
from recon.basics.seeds import derived_seed
from recon.calibration.statistics import InputStatistics
from recon.models.anatomy import Anatomy
from recon.models.matrices import by_parameter, joined
from recon.models.windows import (
    Window,
    Windows,
    block_windows,
    group_windows,
    require_groups,
    submodule_windows,
)
from recon.profiling.ledger import followed
from recon.profiling.phases import PhaseName
from recon.scopes.base import StartName
from recon.scopes.exact import solve
from recon.scopes.local.batches import Batch, shuffled
from recon.scopes.local.module import LocalScope
from recon.scopes.local.rate_search import FIRST_TIMES_WIDTH, HELD_OUT, Budget, Choice, representatives, search
from recon.scopes.local.schedule import require_dense_inputs, require_owners, require_propagation
from recon.scopes.local.window_error import outputs
from recon.scopes.local.window_progress import WindowProgress
from recon.scopes.local.window_state import compiled
from recon.scopes.lora import DEFAULT_LORA, Lora, attach, merge
from recon.scopes.losses import WindowLoss, window_loss
from recon.scopes.optimization import LearningRate, require_rates, rise_and_fall, warmup_and_linear_decay
from recon.scopes.trainable import Parameters, chosen

log = logging.getLogger("recon")


class Distillation(LocalScope):
    """Trains each window's weights until its output matches its target.

    One optimizer serves all windows in turn: it holds the parameters of the current one, and its state is dropped
    when the window ends, so memory does not grow with depth.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        loss: `normalised`, the squared error over the energy of the batch's target; `mse`, the mean squared error;
            `cosine`, one minus the cosine between output and target, mean over tokens.
        parameters: What learns in a window: `all`; `weights`, matrices of linear maps; `vectors`, norms and
            biases; `routers`, which choose among experts; `lora`, low-rank updates of the pruned matrices, merged into
            them when the window ends.
        lora: Rank and alpha of these updates.
        lr: Peak learning rate of AdamW, for each window anew. `auto` tries some on the middle window of each kind
            (attention, MLP), in short trials that take at most a tenth of the training, and takes the one of the lowest
            held-out error.
        weight_decay: AdamW's weight decay.
        betas: AdamW's averaging coefficients.
        warmup: Share of a window's steps with a rising learning rate; it falls linearly to zero afterwards.
        start: As in `Scope`. `exact` takes a solve of each matrix on the inputs of its window; on the bundled
            model three epochs from it reach what four from `pruned` do. `auto` falls back on `pruned` where there
            are too few calibration tokens for the solution to hold on others.
        compile: Train with torch.compile. Steps are faster after a wait; last digits differ.
        **options: Batch size, and which model: see `LocalScope`.

    Attributes:
        choices: With `lr: auto`, the rate of each kind of window that was searched for or read.
    """

    def __init__(
        self,
        epochs: int = 4,
        loss: WindowLoss = "normalised",
        parameters: Parameters = "all",
        lora: Lora = DEFAULT_LORA,
        lr: LearningRate = "auto",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.1,
        start: StartName = "auto",
        compile: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, start=start, **options)
        require_rates(lr, weight_decay, betas, warmup)
        self.loss: WindowLoss = loss
        self.which_parameters: Parameters = parameters
        self.lora = lora
        self.lr: LearningRate = lr
        self.weight_decay, self.betas, self.warmup = weight_decay, betas, warmup
        self._adapters: list[str] = []
        self._learning: list[str] = []  # names of the parameters that learn in the window under way
        self._steps = 0  # of a window
        self._warned_of_few = False
        self.choices: dict[str, Choice] = {}
        self.compiles, self._compiled = compile, ExitStack()

    def label_notes(self) -> list[str]:
        """As `LocalScope.label_notes`, with loss and parameters."""
        notes = [] if self.loss == "normalised" else [self.loss]
        return super().label_notes() + notes + ([] if self.which_parameters == "all" else [self.which_parameters])

    @property
    def rates(self) -> dict[str, dict[str, Any]]:
        """As `Scope.rates`, once the fit has begun."""
        return {kind: choice.as_dict() for kind, choice in self.choices.items()}

    def configure_optimizers(self):
        """Make AdamW, with a schedule that begins anew with each window."""
        if not self.windows:
            return []
        first = self.model.get_parameter(self.windows[0].owned[0])  # in place of a window's, until one begins
        lr = 1.0 if self.lr == "auto" else self.lr  # each window sets its own
        optimizer = torch.optim.AdamW([first], lr=lr, betas=self.betas, weight_decay=self.weight_decay)
        steps_in_all = int(self.trainer.estimated_stepping_batches)  # an epoch's last batches make a step, however few
        self._steps = self.epochs * steps_in_all // max(1, self.max_epochs)
        return {
            "optimizer": optimizer,
            "lr_scheduler": warmup_and_linear_decay(optimizer, self._steps, self.warmup, period=self._steps),
        }

    @torch.no_grad()
    def observe(self, statistics: dict[str, InputStatistics]) -> None:
        """Solve each matrix for the weights that it starts from."""
        for group in by_parameter(self.replay.anatomy.weights_among(statistics)):
            solved = {}
            for name, matrix in group.items():
                self._warn_of_few(name, statistics[name])
                solution = solve(matrix, statistics[name], self.masks.of(matrix, matrix.parameter.device))
                solved[name] = solution.weight.to(matrix.parameter.dtype)
            self.block_masks.starts |= joined(group, solved, Tensor.clone)

    def _warn_of_few(self, name: str, statistics: InputStatistics) -> None:
        """Say once if a matrix has more unknowns in a row than there are tokens to find them."""
        assert statistics.gram is not None
        unknowns = len(statistics.gram)
        if statistics.num_tokens < unknowns and not self._warned_of_few:
            self._warned_of_few = True
            log.warning(
                f"an exact start needs more calibration tokens than a matrix has inputs, got {statistics.num_tokens} "
                f"for the {unknowns} of {name}: its solution fits these tokens alone; raise data.num_sequences"
            )

    def begin(self, window: Window) -> None:
        """As `LocalScope.begin`; the parameters that learn require gradients from now on."""
        super().begin(window)
        self._learning = self.trained(window)
        if self.which_parameters == "lora":
            self._adapters = attach(self.model, self.masks, window.owned, self.lora, self.data.seed)
            self._learning = self._adapters
        self.learn(self._learning)
        if self.compiles:
            self._compiled = compiled(window.blocks)

    def on_fit_start(self) -> None:
        """As `LocalScope.on_fit_start`; recall the rates that an earlier start or another process has chosen."""
        super().on_fit_start()
        paths = self.paths
        if self.lr == "auto" and paths is not None and paths.manifest.is_intact(paths.rates):
            found = read_json(paths.rates, dict, "a run", "delete it: the rates are searched for again")
            self.choices = {kind: Choice.from_dict(one) for kind, one in found.items()}

    def _begin_next(self) -> WindowProgress:
        """As `LocalScope._begin_next`; with `lr: auto`, search for rates before the first window."""
        if self.lr == "auto" and not self.choices:
            self._choose_rates()
        progress = super()._begin_next()
        if self.lr == "auto":
            self._set_rate(self.choices[progress.window.kind].lr)
        return progress

    def _set_rate(self, lr: float) -> None:
        """Let the schedule of the window under way peak at `lr`."""
        schedule: Any = self.lr_schedulers()
        schedule.base_lrs = [lr]
        factor = rise_and_fall(0, self._steps, self.warmup)
        self._optimizer().param_groups[0].update(lr=lr * factor, initial_lr=lr)

    def _choose_rates(self) -> None:
        """Search for the rate of each kind of window, on the middle one of all, and note it in the run directory.

        The choice depends on model, masks and data alone: every process makes the same.
        """
        self.phases.enter(PhaseName.SEARCH)
        tried = representatives(self.windows)
        budget = self._budget(tried)
        num = min(budget.steps * self._step_sequences, len(self.data.tokens("train")))
        chosen = shuffled(len(self.data.tokens("train")), num, derived_seed(self.data.seed, 0, 0))
        sequences = self.data.tokens("train")[chosen], self.data.tokens("validation")[:HELD_OUT]
        for window in self.aside(tried, *sequences):
            before = self._held_out_error(window)
            choice = self._search(window, budget, before)
            self.choices[window.kind] = choice
            log.info(f"learning rate of {window.kind} windows  {choice.summary} on {window.name}, before {before:.4g}")
        if (paths := self.paths) is not None:
            write_json(paths.rates, self.rates, paths.manifest.writing)

    def _budget(self, tried: Sequence[Window]) -> Budget:
        num_kinds, size = len(tried), max(len(window.blocks) for window in tried)
        return Budget.of(
            steps=self._steps,
            num_blocks=sum(len(window.blocks) for window in self.windows) / num_kinds,
            size=size,
            reach=max(window.indices[-1] for window in tried) + 1,
            of_step=self._step_sequences,
            num_held_out=min(HELD_OUT, len(self.data.tokens("validation"))),
        )

    def _search(self, window: Window, budget: Budget, before: float) -> Choice:
        """Try rates on `window`, whose weights are afterwards those that it began with."""
        self._start.keep(self._learning)

        def error_of(lr: float) -> float:
            with followed("trial"):
                self._train_briefly(window, lr, budget.steps)
            try:
                return self._held_out_error(window)
            except FloatingPointError:
                return math.inf
            finally:
                self._optimizer().zero_grad()
                self._optimizer().state.clear()
                self._start.restore()

        return search(error_of, FIRST_TIMES_WIDTH / self.calibration.hidden.shape[-1], budget, before)

    @property
    def _step_sequences(self) -> int:
        """Sequences of an optimizer step."""
        return self.batch_size * self.trainer.accumulate_grad_batches

    def _train_briefly(self, window: Window, lr: float, num_steps: int) -> None:
        """Train `window` by a schedule of few steps, as Lightning's loop trains it by a long one."""
        optimizer, strategy = self._optimizer(), self.trainer.strategy
        num, needed = len(self.calibration.hidden), num_steps * self._step_sequences
        batches = self.batches(window, torch.arange(needed) % num)

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = []
            for batch in islice(batches, self.trainer.accumulate_grad_batches):
                with self.trainer.precision_plugin.train_step_context():
                    loss = window_loss(*outputs(self.replay, window, batch), self.loss)
                strategy.backward(loss / self.trainer.accumulate_grad_batches, optimizer)
                losses.append(loss.detach())
            return torch.stack(losses).mean()

        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = lr * rise_and_fall(step, num_steps, self.warmup)
            strategy.optimizer_step(optimizer, closure)

    def trained(self, window: Window) -> list[str]:
        """Names of the parameters of `window` that learn; those that adapters are merged into where these learn."""
        if self.which_parameters == "lora":
            return super().trained(window)
        parameters = {name: self.model.get_parameter(name) for name in window.owned}
        return chosen(parameters, window.blocks, self.which_parameters, f"window {window.name}")

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
    """Recovers every token mixer (attention) and every MLP submodule by itself, or other groups of a block's matrices.

    A mixer window ends where the token mixer returns; an MLP window is the block with its mixer's output given. A
    block that no mixer divides (a state-space layer without an MLP) is one window.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew; `auto` searches for it, see `Distillation`.
        windows: Groups of matrices by patterns of their names, in place of attention and MLP. A group learns to
            return what it does in the dense block, at those of its matrices that no other of them reads; norms
            stay as they are.
        **options: More of the training, batch size, and which model: see `Distillation` and `LocalScope`.
    """

    scope = "submodule"

    def __init__(
        self, epochs: int = 4, lr: LearningRate = "auto", windows: Windows | None = None, **options: Any
    ) -> None:
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
            require_owners({one.weight_name for one in grouped}, pruned)

    def build_windows(self) -> Sequence[Window]:
        """Lay out token mixer and MLP of every block, or the groups."""
        return submodule_windows(self.replay) if self.groups is None else group_windows(self.replay, self.groups)


class BlockDistillation(Distillation):
    """Recovers one or more consecutive blocks at a time.

    Args:
        num_blocks: Blocks a window; the last window is shorter if the depth is no multiple of it.
        stride: Blocks from one window's start to the next one's; num_blocks if null. If it is smaller, windows overlap,
            and the blocks that two of them share are trained again, from the weights that the first left.
        epochs: Passes over the calibration sequences, for each window.
        lr: Peak learning rate of AdamW, for each window anew; `auto` searches for it, see `Distillation`.
        **options: More of the training, batch size, and which model: see `Distillation` and `LocalScope`.
    """

    scope = "block"

    def __init__(
        self, num_blocks: int = 1, stride: int | None = None, epochs: int = 4, lr: LearningRate = "auto", **options: Any
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
