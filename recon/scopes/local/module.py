"""The Lightning module of the local scopes: one `Trainer.fit` that goes through the model window by window.

A window takes `epochs` consecutive Lightning epochs, and is written to the run directory at once. A restarted run loads
it, recomputes only the activations, and ends bit-identically. `schedule` decides which window is next.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from recon.basics.files import write_json
from recon.basics.seeds import derived_seed
from recon.basics.units import readable
from recon.calibration.activations import Activations, Observation
from recon.calibration.rows import Rows
from recon.calibration.statistics import InputStatistics
from recon.data import TokenData
from recon.data.sources import Split
from recon.distributed.strategies import WindowParallelStrategy
from recon.models.windows import Window
from recon.profiling.ledger import followed
from recon.profiling.phases import PhaseName, window_phase
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.start_weights import apply
from recon.scopes.enforcement import MaskEnforcer
from recon.scopes.local.batches import Batch, WindowBatches
from recon.scopes.local.block_masks import BlockMasks
from recon.scopes.local.schedule import Schedule, require_recovered_inputs
from recon.scopes.local.window_error import held_out_error
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.local.window_progress import WindowProgress, say_if_reset
from recon.scopes.local.window_state import StartCopies, Upcast, WithheldWeights, freeze, give
from recon.scopes.local.window_writer import WindowWriter
from recon.scopes.local.windowed import WindowedScope
from recon.scopes.starts import carry_over, require_dense_elsewhere

log = logging.getLogger("recon")


class LocalScope(WindowedScope):
    """Recovers window after window, each against the dense model's activations.

    A window that ends with a larger held-out error than it began with returns to the weights that it began with: see
    `WindowedScope`, which has the options, too.
    """

    @abstractmethod
    def build_windows(self) -> Sequence[Window]:
        """The windows in the order of depth, which together own every masked weight."""

    @property
    def needs(self) -> Observation:
        """Statistics of the inputs of pruned matrices that this scope uses, beside the activations."""
        return "start gram" if self.start in ("exact", "auto") else "none"

    def observe(self, statistics: dict[str, InputStatistics]) -> None:
        """Use the statistics of the inputs of some matrices, still dense, before their window begins."""

    def enforced(self) -> Masks:
        """Return the masks of finished windows and of the one under way."""
        return self.masks.subset([name for name in self.schedule.begun if name not in self._withheld])

    def prepare(
        self,
        data: TokenData,
        masks: Masks,
        directory: Path | None = None,
        moved: Mapping[str, Tensor] | None = None,
        interleaved: Interleaved | None = None,
    ) -> None:
        """As `Scope.prepare`; lays out the windows and freezes the model.

        Raises:
            ValueError: If the model cannot be run window by window, a mask has no window, or options conflict.
        """
        super().prepare(data, masks, directory, moved, interleaved)
        if self.offload == "disk" and directory is None:
            raise ValueError("model.offload: disk writes finished windows and reads them again, got no run directory")
        if interleaved is not None:
            require_recovered_inputs(self.propagation)
        self.interleaved = interleaved
        self.files = WindowFiles(self.paths and self.paths.windows, self.offloaded and self.offloaded.disk_weights)
        self.writer = WindowWriter(self.files)
        self.model.requires_grad_(False)
        self.replay = self.open_replay()
        self.block_masks = BlockMasks(self.model, masks, interleaved, self.start == "moved", self.start_weights)
        self.schedule = Schedule(
            self.build_windows(), self.maskable, self.block_masks.pruned(), self.share, self.propagation, self.files
        )
        self._require_dense_elsewhere()
        self.under_way = None
        self._withheld, self._start = WithheldWeights(self.model), StartCopies(self.model)
        self._precision, self._is_aside = Upcast(), False
        self._started: dict[str, str] = {}  # which start the window under way has, where that was chosen

    def carried(self, window: Window) -> list[str]:
        """Names of the parameters of `window` that it has from another run, with `start: run`."""
        return window.owned

    def _require_dense_elsewhere(self) -> None:
        """Refuse another run's weights where they differ from the dense ones outside of all windows."""
        if self.start == "run" and self.start_weights is not None:
            carried = {name for window in self.windows for name in self.carried(window)}
            require_dense_elsewhere(self.model, self.offloaded, carried, self.start_weights, self.scope)
            self.replay.hold(())

    def solve_start(self) -> None:
        """Solve nothing yet: each block is solved when its inputs are known."""

    def setup(self, stage: str) -> None:
        """As `Scope.setup`.

        Raises:
            ValueError: If the trainer would stop in the middle of a window.
        """
        super().setup(stage)
        if self.trainer.max_steps != -1:
            raise ValueError(
                f"a local scope goes through all its windows, got trainer.max_steps={self.trainer.max_steps}; "
                f"choose fewer model.epochs or a smaller data.num_sequences (fast_dev_run sets max_steps, too)"
            )

    def on_fit_start(self) -> None:
        """Embed the calibration and the held-out sequences."""
        self.phases.enter(PhaseName.EMBED)
        if self.offloaded is not None:
            self.offloaded.move_to(self.device)
        self.calibration, self.held_out = self._embed("train"), self._embed("validation")
        if self.storage.may_be_on_device:
            copies, more = (3, ", one more than windows of whole blocks need") if self.taps else (2, "")
            log.info(
                f"hidden states of all sequences may take the device: {copies} copies of "
                f"{readable(self.calibration.hidden.nbytes)}{more}; model.activations: host keeps them off it"
            )

    def _embed(self, split: Split) -> Activations:
        tokens, starts = self.data.tokens(split), self.schedule.starts()
        options = self.batch_size, self.device, self.propagation, self.taps, starts, self.storage
        return Activations(self.replay, tokens, *options)

    def train_dataloader(self) -> WindowBatches:
        """Batches of the window that is under way when an epoch begins."""
        return WindowBatches(len(self.data.tokens("train")), self.batch_size, self._order_seed, self._load)

    def _order_seed(self) -> int:
        assert self.under_way is not None
        return derived_seed(self.data.seed, self.schedule.index(self.under_way.window), self.under_way.epoch)

    def _load(self, order: Tensor) -> Iterator[Batch]:
        assert self.window is not None
        return self.batches(self.window, order)

    def batches(self, window: Window, order: Tensor) -> Iterator[Batch]:
        """Yield the calibration sequences of a window that has begun, in this order."""
        rows = Rows.split(order, self.batch_size, self.device)
        batches = self.calibration.batches(rows, partial(self.calibration.batch, window))
        return (batch for _, batch in batches)

    def on_train_epoch_start(self) -> None:
        """Begin the next missing window when the last one has had its epochs."""
        if self.under_way is None:
            self.under_way = self._begin_next()
        self.under_way.epoch += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the held-out error after an epoch's last batch; callbacks see it when the epoch ends."""
        if self.trainer.is_last_batch:
            assert self.under_way is not None
            self.under_way.after = error = self._held_out_error(self.under_way.window)
            self.log("held_out_error", error, prog_bar=True, on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Finish the window after its last epoch."""
        assert self.under_way is not None
        if self.under_way.epoch == self.epochs and self.trainer.is_last_batch:  # not if the trainer was told to stop
            self._finish()

    def on_fit_end(self) -> None:
        """Load the finished windows that were not trained here, write all results, free the activations.

        Raises:
            OSError: If the last window could not be written.
            RuntimeError: If a trainer stopped before the last window.
            ConnectionError: If another process has ended before its last window.
        """
        del self.calibration, self.held_out
        self.writer.wait()
        self.schedule.require_written(self.own_windows)
        if isinstance(self.trainer.strategy, WindowParallelStrategy):
            self.phases.enter(PhaseName.WAIT)
            self.trainer.strategy.wait()
        if not self.assembles:
            self.check(self.enforced())
            return
        self.schedule.require_written(self.windows)
        for window in self.schedule.unfinished(self.windows):
            self.block_masks.choose(self.schedule.enter(window), {})
            self.replay.hold(window.indices)
            self._take(window)
        super().on_fit_end()
        self.replay.hold(())
        if self.paths is not None:
            write_json(self.paths.window_results, self.results, self.paths.manifest.writing)

    def cpu(self) -> "LocalScope":
        """As of any module, but not when a fit ends, as Lightning asks: the weights are checked and written first."""
        trainer = self._trainer
        return super().cpu() if trainer is None or trainer.state.status != TrainerStatus.RUNNING else self

    def release(self) -> None:
        """As `Scope.release`; the results stay."""
        super().release()
        del self.replay, self.block_masks, self.files, self.writer, self._withheld, self._start, self._precision
        self.schedule.release()
        if self.interleaved is not None:
            self.interleaved = replace(self.interleaved, prunable={})

    def break_off(self) -> None:
        """As `Scope.break_off`; the last finished window is written to the end."""
        try:
            self.writer.wait()
        except OSError as error:  # the fit has failed by another one
            log.error(str(error))

    def begin(self, window: Window) -> None:
        """Compute inputs and targets of the window, then prune its weights.

        Survivors get the weights that they start from. Weights that an overlapping window has recovered stay as they
        are. A copy of the start waits on the host for the end of the window.
        """
        self._approach(window)
        later = [] if self.needs == "none" else self.schedule.known_later(window, self.masks)
        matrices = window.blocks[0].weights_among(later)
        if statistics := self.calibration.prepare(window, matrices, "start gram" if matrices else "none"):
            self.observe(statistics)
        self.held_out.prepare(window)
        self._withheld.keep_dense(window)
        self._prune(window, self.schedule.begin(window, self.masks))
        self._start.keep(self.trained(window))
        self._precision.upcast(window.blocks)

    def _prune(self, window: Window, names: Sequence[str]) -> None:
        """Prune these parameters; with `start: auto` to the start of the lower held-out error, pruned or exact."""
        if self.start == "run" and (run := self.block_masks.start_weights) is not None:
            first = [name for name in self.carried(window) if self.schedule.owner(name) is window]
            carry_over(self.model, [name for name in first if name not in self.masks], run)
        if self.start != "auto":
            return self.block_masks.prune(names)
        starts, self._started = self.block_masks.take_starts(names), {}
        apply(self.model, self.masks.subset(names), None)
        if not starts:
            return
        pruned = self._held_out_error(window)
        self._start.keep(starts)
        give(self.model, starts)  # zero where pruned
        exact = self._held_out_error(window)
        self._started = {"start": "exact" if exact <= pruned else "pruned"}
        if exact > pruned:
            self._start.restore()
            log.log(
                logging.DEBUG if self._is_aside else logging.WARNING,
                f"window {window.name} starts from its pruned weights, held-out error {pruned:.4g}, for that of the "
                f"exact solution is {exact:.4g}: it fits the calibration tokens alone; give more of them",
            )

    def trained(self, window: Window) -> list[str]:
        """Names of the parameters of `window` that recovery changes; the masked ones unless a scope has more."""
        return [name for name in window.owned if name in self.masks]

    def _approach(self, window: Window) -> None:
        """Bring the activations to `window`; choose the masks and the start of blocks that are reached first now."""
        fresh, is_known = self.schedule.enter(window), self.schedule.is_known_now
        matrices, need = self.block_masks.observed(fresh, self.needs, is_known)
        statistics = self.calibration.enter(window.indices, matrices, need)
        self.held_out.enter(window.indices)
        self.block_masks.choose(fresh, statistics)
        if self.needs != "none":
            with followed("solve"):
                known = {name for name, one in matrices.items() if is_known(one.parameter_name)}
                self.observe({name: one for name, one in statistics.items() if name in known})

    def _begin_next(self) -> WindowProgress:
        """Load the next windows that are written already, and begin the first that is not."""
        written, window = self.schedule.upcoming()
        for one in written:
            self._approach(one)
            self._take(one)
        if window is None:  # another process has written them all meanwhile
            raise StopIteration  # ends the loop of Lightning's fit in good order
        self.phases.enter(window_phase(window.name))
        self.begin(window)
        return WindowProgress(window, before=self._held_out_error(window))

    def aside(self, windows: Sequence[Window], train: Tensor, validation: Tensor) -> Iterator[Window]:
        """Begin some windows on a few sequences, and leave no trace: weights and masks are then as they were.

        The inputs are those of the dense model, whatever enters the windows in the fit.

        Args:
            windows: In the order of depth; their weights are dense.
            train: Calibration sequences, int64[num_sequences, seq_len].
            validation: Held-out sequences, likewise.

        Yields:
            Each window after it has begun.
        """
        names = ("calibration", "held_out", "schedule", "block_masks", "interleaved")
        names += ("_start", "_withheld", "_precision", "_is_aside")
        own, masked = {name: vars(self)[name] for name in names}, list(self.masks)
        few_rows = dict(self.experts.few)
        maskable = [name for window in windows for name in window.owned if name in self.maskable]
        pruned = [name for name in self.block_masks.pruned() if name in maskable]
        starts = [window.indices[0] for window in windows]
        options = self.batch_size, self.device, "dense", self.taps, starts, self.storage
        dense = StartCopies(self.model)
        try:
            self.calibration, self.held_out = (Activations(self.replay, one, *options) for one in (train, validation))
            self.schedule = Schedule(windows, maskable, pruned)
            self.interleaved = self.interleaved and replace(self.interleaved, directory=None)
            begun = self.block_masks.keeps_moved, self.block_masks.start_weights
            self.block_masks = BlockMasks(self.model, self.masks, self.interleaved, *begun)
            self._start, self._withheld = StartCopies(self.model), WithheldWeights(self.model)
            self._precision, self._is_aside = Upcast(), True
            for window in windows:
                self._approach(window)
                dense.keep(window.owned)
                self.begin(window)
                yield window
                self.end(window)
                self._precision.restore()
                dense.restore()
        finally:
            vars(self).update(own)
            self.experts.few = few_rows
            self.masks.remove(self.masks.keys() - set(masked))
            for one in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(one, MaskEnforcer):
                    one.forget()

    def _held_out_error(self, window: Window) -> float:
        with self.trainer.precision_plugin.train_step_context():  # as the steps are computed
            return held_out_error(self.replay, window, self.held_out)

    def learn(self, names: Iterable[str]) -> None:
        """Let these parameters learn, and no others: one optimizer serves all windows in turn."""
        parameters = [self.model.get_parameter(name).requires_grad_(True) for name in names]
        self._optimizer().param_groups[0]["params"] = parameters

    def rest(self) -> None:
        """Freeze the parameters that learned, without gradients and optimizer state from now on."""
        freeze(self._optimizer())

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)  # pyright: ignore[reportReturnType]

    def end(self, window: Window) -> dict[str, Any]:
        """Free all that only `window` needed; return what a report says about it, as JSON."""
        return {}

    def _finish(self) -> None:
        """Check, write and leave the window under way, with the better of its start and its end."""
        assert self.under_way is not None
        progress, window = self.under_way, self.under_way.window
        cost = {"tokens": progress.tokens, "seconds": self.tally.seconds}
        result = {**progress.errors, **cost, **self._started, **self.end(window)}
        self._precision.restore()
        if progress.is_worse:
            self._start.restore()
        self._start.drop()
        self.masks.subset([name for name in window.owned if name in self.masks]).check(self.model)
        result = self.writer.keep(window, self.model, result)
        if self.logger is not None:
            errors = {"window/before": result["before"], "window/after": result["after"]}
            self.logger.log_metrics(errors, step=self.schedule.index(window))
        self._leave(window, result)
        self.under_way = None

    def _take(self, window: Window) -> None:
        """Load a window that is written already."""
        self._withheld.keep_dense(window)
        result = self.files.load(window, self.model)
        self.schedule.begin(window, self.masks)
        self._leave(window, result)

    def _leave(self, window: Window, result: dict[str, Any]) -> None:
        """Note the results; withhold the weights as long as windows of the same block need it dense."""
        self.schedule.finish(window, result)
        say_if_reset(window, result)
        self._withheld.withhold(window)
        if self.schedule.is_last_of_block(window):
            self._withheld.hand_over()
