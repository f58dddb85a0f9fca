"""The Lightning module of the local scopes: one `Trainer.fit` that goes through the model window by window.

A window takes `epochs` consecutive Lightning epochs, and is written to the run directory at once. A restarted run loads
it, recomputes only the activations, and ends bit-identically. `schedule` decides which window is next.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from recon.basics.files import write_json
from recon.basics.seeds import derived_seed
from recon.calibration.activations import Activations, Observation, Propagation
from recon.calibration.rows import Rows
from recon.calibration.statistics import InputStatistics
from recon.calibration.storage import Budget, Place, Storage
from recon.data import TokenData
from recon.data.sources import Split
from recon.distributed.part import Share
from recon.distributed.strategies import WindowParallelStrategy
from recon.models.windows import Window
from recon.profiling.ledger import followed
from recon.profiling.phases import PhaseName, window_phase
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.scopes.base import Scope
from recon.scopes.local.batches import Batch, WindowBatches
from recon.scopes.local.block_masks import BlockMasks
from recon.scopes.local.schedule import Schedule, require_independent, require_recovered_inputs
from recon.scopes.local.window_error import held_out_error
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.local.window_state import Upcast, WithheldWeights, freeze


class LocalScope(Scope):
    """Recovers window after window, each against the dense model's activations.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        batch_size: Sequences per step, and per forward pass of the dense model.
        propagation: Inputs and targets of a window. `dense`: hidden states of the dense model, and the dense window's
            output for them, so that windows are independent. `recovered_local`: hidden states of the recovered model,
            and the dense window's output for them. `recovered`: hidden states of the recovered model, and those of the
            dense model behind the window, so that a window makes up for the error that enters it: from attention on
            where a block adds attention's output to its input, elsewhere at the block's output.
        activations: Storage of hidden states between two passes: `device`; `host`, from which each batch is copied (to
            a CUDA device from pinned memory, while the batch in front trains); `disk`, unnamed files in the run
            directory, mapped into memory; `auto`, the first of these with room for a copy. The results are the same.
            At most two copies exist at a time, and one of attention's outputs.
        activations_budget: Memory for copies on the device of each process, for `auto`, such as 4GiB.
        activations_host_budget: Memory for copies on the host, in each process, for `auto`; no limit if null.
        activations_dtype: Dtype of the copies; that of the model if null.
        **options: Which model: see `Scope`.

    Attributes:
        schedule: The windows and the progress through them; laid out by `prepare`.
        window: The window under way; None between two.
    """

    by_window = True

    def __init__(
        self,
        epochs: int = 4,
        batch_size: int = 8,
        propagation: Propagation = "dense",
        activations: Place = "device",
        activations_budget: str | None = None,
        activations_host_budget: str | None = None,
        activations_dtype: Literal["float32", "bfloat16"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, **options)
        budget = Budget.of(activations, activations_budget, activations_host_budget)
        dtype = None if activations_dtype is None else getattr(torch, activations_dtype)
        self._storage = Storage(activations, dtype, budget)
        if batch_size < 1:
            raise ValueError(f"model.batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.propagation: Propagation = propagation
        self.taps = False  # whether windows begin or end where attention returns
        self.schedule = Schedule()
        self.share, self.assembles, self.files = Share(), True, WindowFiles()
        self.window: Window | None = None
        self.interleaved: Interleaved | None = None
        self._epoch = self._window_tokens = self._before = self._after = 0

    @property
    def windows(self) -> Sequence[Window]:
        """All windows that hold a pruned weight, in the order of depth; none before `prepare`."""
        return self.schedule.windows

    @property
    def own_windows(self) -> Sequence[Window]:
        """The windows that this process recovers."""
        return self.schedule.own

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Per finished window its held-out error `before` and `after`, `tokens`, `seconds` of the run, and more."""
        return self.schedule.results

    @abstractmethod
    def build_windows(self) -> Sequence[Window]:
        """The windows in the order of depth, which together own every masked weight."""

    @property
    def needs(self) -> Observation:
        """Statistics of the inputs of pruned matrices that this scope uses, beside the activations."""
        return "gram" if self.start == "exact" else "none"

    def observe(self, statistics: dict[str, InputStatistics]) -> None:
        """Use the statistics of the inputs of some matrices, still dense, before their window begins."""

    @property
    def max_epochs(self) -> int:
        """Epochs of this process's windows that are not written yet."""
        return self.epochs * len(self.missing(self.own_windows))

    @property
    def train_tokens(self) -> int:
        """Tokens that went through a window, the most of all windows: together they are one model."""
        return max((result["tokens"] for result in self.results.values()), default=0)

    @property
    def progress(self) -> str:
        """The window under way and its epoch, with their numbers."""
        if self.window is None:
            return f"window {len(self.results)}/{len(self.windows)}"
        epoch = f"  epoch {self._epoch}/{self.epochs}" if self.epochs > 1 else ""
        return f"window {self.schedule.index(self.window) + 1}/{len(self.windows)}  {self.window.name}{epoch}"

    @property
    def forward_batch_size(self) -> int:
        """As in training."""
        return self.batch_size

    @property
    def label(self) -> str:
        """Name of the scope, with the options that are not the default."""
        notes = ", ".join(self.label_notes())
        return f"{self.label_stem} ({notes})" if notes else self.label_stem

    @property
    def label_stem(self) -> str:
        """Name that the label begins with."""
        return self.scope

    def label_notes(self) -> list[str]:
        """List the options that a label adds in brackets."""
        notes = [] if self.propagation == "dense" else [self.propagation.replace("_", " ")]
        return notes + (["interleaved"] if self.interleaved else [])

    @property
    def maskable(self) -> list[str]:
        """Names of all parameters that have a mask, or get one during the fit."""
        return list(self.masks if self.interleaved is None else self.interleaved.prunable)

    def enforced(self) -> Masks:
        """Return the masks of finished windows and of the one under way."""
        return self.masks.subset([name for name in self.schedule.begun if name not in self._withheld])

    def require_strategy(self, trainer: L.Trainer) -> None:
        """As `Scope.require_strategy`; several processes may recover windows of their own."""
        super().require_strategy(trainer)
        if isinstance(trainer.strategy, WindowParallelStrategy):
            self.require_independent("strategy window_parallel")

    def require_independent(self, what: str) -> None:
        """Refuse options that make windows depend on each other.

        Args:
            what: The option that needs independent windows, in the words of the message.

        Raises:
            ValueError: If recovered weights enter a window.
        """
        require_independent(self.propagation, what)

    def divide(self, share: Share, assembles: bool) -> None:
        """Choose the windows that this process recovers, before `prepare`; all by default.

        Args:
            share: Part of the windows.
            assembles: Whether this process loads the windows of all others when the fit ends, so that its model is
                whole; under `WindowParallelStrategy` it waits for them.
        """
        self.share, self.assembles = share, assembles

    def missing(self, windows: Sequence[Window]) -> list[Window]:
        """List those of `windows` that are not written yet."""
        return self.schedule.missing(windows)

    def recall(self, windows: Sequence[Window]) -> None:
        """Take over the seconds until the last of those of `windows` that are written."""
        self.tally.go_on(max((self.files.result(one)["seconds"] for one in windows if one in self.files), default=0.0))

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
            ValueError: If the model cannot be run window by window, no window owns a masked weight, or
                options do not go together.
        """
        super().prepare(data, masks, directory, moved, interleaved)
        if self.offload == "disk" and directory is None:
            raise ValueError("model.offload: disk writes finished windows and reads them again, got no run directory")
        if interleaved is not None:
            require_recovered_inputs(self.propagation)
        self.interleaved = interleaved
        self.files = WindowFiles(self.paths and self.paths.windows, self.residence and self.residence.disk_weights)
        self.model.requires_grad_(False)
        self.replay = self.open_replay()
        self.block_masks = BlockMasks(self.model, masks, interleaved, self.start == "moved", self.start_weights)
        self.schedule = Schedule(
            self.build_windows(), self.maskable, self.block_masks.pruned(), self.share, self.propagation, self.files
        )
        self.window = None
        self._withheld, self._precision = WithheldWeights(self.model), Upcast()

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
        if self.residence is not None:
            self.residence.move_to(self.device)
        self.calibration, self.held_out = self._embed("train"), self._embed("validation")

    def _embed(self, split: Split) -> Activations:
        tokens, starts = self.data.tokens(split), self.schedule.starts()
        options = self.batch_size, self.device, self.propagation, self.taps, starts, self.storage
        return Activations(self.replay, tokens, *options)

    def train_dataloader(self) -> WindowBatches:
        """Batches of the window that is under way when an epoch begins."""
        return WindowBatches(len(self.data.tokens("train")), self.batch_size, self._order_seed, self._load)

    def _order_seed(self) -> int:
        assert self.window is not None
        return derived_seed(self.data.seed, self.schedule.index(self.window), self._epoch)

    def _load(self, order: Tensor) -> Iterator[Batch]:
        assert self.window is not None
        rows = Rows.split(order, self.batch_size, self.device)
        batches = self.calibration.batches(rows, partial(self.calibration.batch, self.window))
        return (batch for _, batch in batches)

    def on_train_epoch_start(self) -> None:
        """Begin the next missing window when the last one has had its epochs."""
        if self.window is None:
            self._begin_next()
        self._epoch += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the held-out error after an epoch's last batch; callbacks see it when the epoch ends."""
        if self.trainer.is_last_batch:
            assert self.window is not None
            self._after = held_out_error(self.replay, self.window, self.held_out)
            self.log("held_out_error", self._after, prog_bar=True, on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Finish the window after its last epoch."""
        if self._epoch == self.epochs and self.trainer.is_last_batch:  # not if the trainer was told to stop
            self._finish()

    def on_fit_end(self) -> None:
        """Load the finished windows that were not trained here, write all results, free the activations.

        Raises:
            RuntimeError: If a trainer stopped before the last window.
            ConnectionError: If another process has ended before its last window.
        """
        del self.calibration, self.held_out
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
            write_json(self.paths.window_results, self.results)

    def begin(self, window: Window) -> None:
        """Compute inputs and targets of the window, then prune its weights.

        Survivors get the weights that they start from. Weights that an overlapping window has recovered stay as they
        are.
        """
        self._approach(window)
        later = [] if self.needs == "none" else self.schedule.known_later(window, self.masks)
        matrices = window.blocks[0].weights_among(later)
        if statistics := self.calibration.prepare(window, matrices, "gram" if matrices else "none"):
            self.observe(statistics)
        self.held_out.prepare(window)
        self._withheld.keep_dense(window)
        self.block_masks.prune(self.schedule.begin(window, self.masks))
        self._precision.upcast(window.blocks)

    def _approach(self, window: Window) -> None:
        """Bring the activations to `window`; choose the masks and the start of blocks that are reached first now."""
        fresh, is_known = self.schedule.enter(window), self.schedule.is_known_now
        matrices, need = self.block_masks.observed(fresh, self.needs, is_known)
        statistics = self.calibration.enter(window.indices, matrices, need)
        self.held_out.enter(window.indices)
        self.block_masks.choose(fresh, statistics)
        if self.needs != "none":
            with followed("solve"):
                self.observe({name: one for name, one in statistics.items() if is_known(name)})

    def _begin_next(self) -> None:
        """Load the next windows that are written already, and begin the first that is not."""
        written, window = self.schedule.upcoming()
        for one in written:
            self._approach(one)
            self._take(one)
        if window is None:  # another process has written them all meanwhile
            raise StopIteration  # ends the loop of Lightning's fit in good order
        self.phases.enter(window_phase(window.name))
        self.begin(window)
        self.window, self._epoch = window, 0
        self._before = held_out_error(self.replay, window, self.held_out)

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
        """Check, write and leave the window under way."""
        window = self.window
        assert window is not None
        result = {"before": self._before, "after": self._after, "tokens": self._window_tokens}
        result |= {"seconds": self.tally.seconds, **self.end(window)}
        self._precision.restore()
        self.masks.subset([name for name in window.owned if name in self.masks]).check(self.model)
        result = self.files.keep(window, self.model, result)
        if self.logger is not None:
            errors = {"window/before": result["before"], "window/after": result["after"]}
            self.logger.log_metrics(errors, step=self.schedule.index(window))
        self._leave(window, result)
        self.window, self._window_tokens = None, 0

    def _take(self, window: Window) -> None:
        """Load a window that is written already."""
        self._withheld.keep_dense(window)
        result = self.files.load(window, self.model)
        self.schedule.begin(window, self.masks)
        self._leave(window, result)

    def _leave(self, window: Window, result: dict[str, Any]) -> None:
        """Note the results; withhold the weights as long as windows of the same block need it dense."""
        self.schedule.finish(window, result)
        self._withheld.withhold(window)
        if self.schedule.is_last_of_block(window):
            self._withheld.hand_over()
