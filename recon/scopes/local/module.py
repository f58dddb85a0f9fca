"""What the local scopes share: one `Trainer.fit` that goes through the model window by window.

A window takes `epochs` consecutive Lightning epochs. A finished one is written to the run directory at once; a
restarted run skips what is there, recomputing only the activations, and ends bit-identically. With dense inputs
and targets, the default, windows do not depend on each other.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from recon.basics.files import write_json
from recon.basics.seeds import derived_seed
from recon.calibration.activations import Activations, Observation, Propagation
from recon.calibration.statistics import InputStatistics
from recon.calibration.storage import Budget, Place, Storage
from recon.data import TokenData
from recon.distributed.part import Share
from recon.distributed.strategies import WindowParallelStrategy
from recon.models.anatomy import Block
from recon.models.windows import AttentionWindow, GroupWindow, MLPWindow, Window
from recon.profiling.ledger import followed, sampled
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.start_weights import apply
from recon.scopes.base import Scope, check_finite
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.local.window_state import Parking, Widened

Batch = dict[str, Tensor]


class LocalScope(Scope):
    """Recovers window after window, each against the dense model's activations.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        batch_size: Sequences per step, and per forward pass of the dense model.
        propagation: What enters a window and what it should produce: `dense`, dense inputs and what the dense window
            makes of them, so that windows are independent; `recovered_local`, what the recovered model has there,
            and what the dense window makes of that; `recovered`, what the recovered model has there, and what
            the dense model has behind the window, so that the error that enters is made up for. Where a block
            adds what attention returns to what entered it, this makes up for it from attention on, elsewhere
            from the block's output on.
        activations: Where hidden states are between two passes: `device`; `host`, in its memory, from which each batch
            is copied (to a CUDA device from pinned memory, while the batch in front trains); `disk`, in files without
            names in the run directory, mapped into memory; `auto`, each copy in the first of these with room for it.
            The results are the same. At most two copies are there at a time, and one of what attention returns.
        activations_budget: For `auto`: what copies may take on the device of each process, such as 4GiB.
        activations_host_budget: For `auto`: what they may take of the host's memory in each process; no limit if null.
        activations_dtype: In which precision they are kept; that of the model if null.
        **options: Which model: see `Scope`.

    Attributes:
        windows: All windows that hold a pruned weight, in the order of depth; laid out by `prepare`. The
            others reproduce the dense model as they are: training could only move them away from it.
        own_windows: Those of them that this process recovers.
        window: The one under way; None between two.
        results: Name of each finished window -> relative held-out error of its output `before` (as it
            starts) and `after` recovery, and what a scope adds.
    """

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
        self.windows: Sequence[Window] = []
        self.own_windows: Sequence[Window] = []
        self.share, self.assembles, self.files = Share(), True, WindowFiles()
        self.window: Window | None = None
        self.results: dict[str, dict[str, Any]] = {}
        self.interleaved: Interleaved | None = None
        self._epoch = 0
        self._before = self._after = 0.0

    @abstractmethod
    def build_windows(self) -> Sequence[Window]:
        """The windows in the order of depth, which together own every masked weight."""

    @property
    def needs(self) -> Observation:
        """What this scope asks of the inputs of a pruned matrix, beside the activations."""
        return "gram" if self.start == "exact" else "none"

    def observe(self, statistics: dict[str, InputStatistics]) -> None:
        """Take in what enters some pruned matrices, which still are dense; called before their window begins."""

    @property
    def max_epochs(self) -> int:
        """Epochs of this process's windows that are not written yet."""
        return self.epochs * len(self.missing(self.own_windows))

    @property
    def train_tokens(self) -> int:
        """Calibration tokens times epochs: every window sees them, and together they are one model."""
        return self.data.tokens("train").numel() * self.epochs

    @property
    def progress(self) -> str:
        """Which window of how many, and which of its epochs."""
        if self.window is None:
            return f"window {len(self.results)}/{len(self.windows)}"
        epoch = f"  epoch {self._epoch}/{self.epochs}" if self.epochs > 1 else ""
        return f"window {self.windows.index(self.window) + 1}/{len(self.windows)}  {self.window.name}{epoch}"

    @property
    def forward_batch_size(self) -> int:
        """As in training."""
        return self.batch_size

    @property
    def label(self) -> str:
        """The scope, and what is not as by default."""
        notes = ", ".join(self.label_notes())
        return f"{self.label_stem} ({notes})" if notes else self.label_stem

    @property
    def label_stem(self) -> str:
        """What the label begins with."""
        return self.scope

    def label_notes(self) -> list[str]:
        """What a label adds in brackets."""
        notes = [] if self.propagation == "dense" else [self.propagation.replace("_", " ")]
        return notes + (["interleaved"] if self.interleaved else [])

    @property
    def maskable(self) -> list[str]:
        """Those masked already, or all that will be."""
        return list(self.masks if self.interleaved is None else self.interleaved.prunable)

    def enforced(self) -> Masks:
        """The masks of finished windows and of the one under way."""
        begun = [window for window in self.windows if window.name in self.results or window is self.window]
        names = dict.fromkeys(name for window in begun for name in window.owned)
        return self.masks.subset([name for name in names if name in self.masks and name not in self._parking])

    def require_strategy(self, trainer: L.Trainer) -> None:
        """As `Scope.require_strategy`; several processes may recover windows of their own."""
        super().require_strategy(trainer)
        if isinstance(trainer.strategy, WindowParallelStrategy):
            self.require_independent("strategy window_parallel")

    def require_independent(self, what: str) -> None:
        """Refuse options that make windows depend on each other.

        Args:
            what: Needs them not to, in the words of the message.

        Raises:
            ValueError: If recovered weights enter a window.
        """
        if self.propagation != "dense":
            raise ValueError(
                f"{what} needs windows that do not depend on each other, got model.propagation: {self.propagation}, "
                f"where what enters a window has passed the recovered ones before it; choose model.propagation: dense"
            )

    def divide(self, share: Share, assembles: bool) -> None:
        """Say, before `prepare`, which windows this process recovers; all by default.

        Args:
            share: Of the windows.
            assembles: Whether this process takes in the windows of all others when the fit ends, so that its model is
                whole; under `WindowParallelStrategy` it waits for them.
        """
        self.share, self.assembles = share, assembles

    def missing(self, windows: Sequence[Window]) -> list[Window]:
        """Those of `windows` that are not written yet."""
        return [window for window in windows if window not in self.files]

    def prepare(
        self,
        data: TokenData,
        masks: Masks,
        directory: Path | None = None,
        moved: Mapping[str, Tensor] | None = None,
        say: Callable[[str], None] = lambda line: None,
        interleaved: Interleaved | None = None,
    ) -> None:
        """As `Scope.prepare`; lays out the windows and freezes the model.

        Raises:
            ValueError: If the model cannot be run window by window, no window owns a masked weight, or
                options do not go together.
        """
        super().prepare(data, masks, directory, moved, say, interleaved)
        if self.offload == "disk" and directory is None:
            raise ValueError("model.offload: disk writes finished windows and reads them again, got no run directory")
        if interleaved is not None and self.propagation == "dense":
            raise ValueError(
                "pruning.inputs: recovered chooses masks from recovered inputs, got model.propagation: dense, which "
                "has none; choose model.propagation: recovered or recovered_local, or pruning.inputs: dense"
            )
        self.interleaved, self.files = interleaved, WindowFiles(directory)
        self.model.requires_grad_(False)
        self.replay = self.open_replay()
        windows = self.build_windows()
        self._require_propagation(windows)
        self.windows = [window for window in windows if self._is_to_recover(window)]
        self.own_windows = self.share.select(self.windows)
        self.window, self.results = None, {}
        self._parking = Parking(self.model)
        self._starts: dict[str, Tensor] = {}  # of blocks entered, not yet begun
        self._entered: set[int] = set()
        self._begun: set[str] = set()
        self._precision = Widened()
        owned = {name for window in windows for name in window.owned}
        orphans = [name for name in self.maskable if name not in owned]
        if orphans:
            raise ValueError(
                f"every pruned weight must belong to one window, got {len(orphans)} that belong to none, "
                f"{orphans[0]} the first; exclude them with `pruning.exclude` or choose scopes/block"
            )

    def solve_start(self, say: Callable[[str], None]) -> None:
        """Nothing yet: each block is solved when its inputs are known."""

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
        self.phases.enter("embed")
        if self.residence is not None:
            self.residence.move_to(self.device)
        starts = {window.indices[0] for window in self.own_windows}
        self.calibration, self.held_out = (
            Activations(
                self.replay,
                self.data.tokens(split),
                self.batch_size,
                self.device,
                self.propagation,
                self.taps,
                starts,
                self.storage,
            )
            for split in ("train", "validation")
        )

    def train_dataloader(self) -> "WindowBatches":
        """Batches of whichever window is under way when they are asked for."""
        return WindowBatches(self)

    def on_train_epoch_start(self) -> None:
        """Begin the next missing window when the last one has had its epochs."""
        if self.window is None:
            self._begin_next()
        self._epoch += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the held-out error after an epoch's last batch; callbacks see it when the epoch ends."""
        if self.trainer.is_last_batch:
            self._after = self.held_out_error()
            self.log("held_out_error", self._after, prog_bar=True, on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Finish the window after its last epoch."""
        if self._epoch == self.epochs and self.trainer.is_last_batch:  # not if the trainer was told to stop
            self._finish()

    def on_fit_end(self) -> None:
        """Take in finished windows that were not trained here, write all results, free the activations.

        Raises:
            RuntimeError: If a trainer stopped before the last window.
            ConnectionError: If another process has ended before its last window.
        """
        del self.calibration, self.held_out
        self._require_written(self.own_windows[len(self.results) :])
        if isinstance(self.trainer.strategy, WindowParallelStrategy):
            self.phases.enter("wait")
            self.trainer.strategy.wait()
        if not self.assembles:
            self.check(self.enforced())
            return
        left = self.windows[len(self.results) :]
        self._require_written(left)
        for window in left:
            self._choose_masks(self._fresh(window), {})
            self.replay.hold(window.indices)
            self._take(window)
        super().on_fit_end()
        self.replay.hold(())
        if self.directory is not None:
            write_json(self.directory / "windows.json", self.results)

    def _require_written(self, windows: Sequence[Window]) -> None:
        if missing := self.missing(windows):
            raise RuntimeError(
                f"a fit needs to go through all {len(self.windows)} windows, it stopped before the end of "
                f"{missing[0].name}; start it again, without trainer.max_time or a callback that stops it"
            )

    def begin(self, window: Window) -> None:
        """Compute what enters the window and what it should produce, then prune its weights.

        Those that survive get their start, the others stay as they are; so do those that an overlapping window has
        recovered.
        """
        self._approach(window)
        if isinstance(window, MLPWindow):
            later = {} if self.needs == "none" else self._later_matrices(window)
            self.observe(self.calibration.pass_attention(later, "gram" if later else "none"))
            self.held_out.pass_attention()
        if isinstance(window, GroupWindow):
            self.calibration.record(window)
            self.held_out.record(window)
            self._parking.keep_dense(window)
        fresh = [name for name in window.owned if name in self.masks and name not in self._begun]
        start = self._starts if self.start_weights is None and self._starts else self.start_weights
        apply(self.model, self.masks.subset(fresh), start)
        self._begun.update(fresh)
        for name in fresh:
            self._starts.pop(name, None)
        self._precision.widen(window.blocks)

    def _approach(self, window: Window) -> None:
        """Walk to `window`; choose masks and starts of blocks that were not there before."""
        fresh = self._fresh(window)
        matrices: dict[str, nn.Module] = {}
        need = self.needs
        if self.interleaved is not None:
            need = _larger(need, self.interleaved.criterion.needs)
            matrices = {
                name: one for block in fresh for name, one in block.weights_among(self.interleaved.prunable).items()
            }
        elif need != "none":
            pruned = {name: one for block in fresh for name, one in block.weights_among(self.masks).items()}
            matrices = {name: one for name, one in pruned.items() if self._is_now(name)}
        statistics = self.calibration.enter(window.indices, matrices, need)
        self.held_out.enter(window.indices)
        self._choose_masks(fresh, statistics)
        if self.needs != "none":
            with followed("solve"):
                self.observe({name: found for name, found in statistics.items() if self._is_now(name)})

    def _choose_masks(self, blocks: Sequence[Block], statistics: Mapping[str, InputStatistics]) -> None:
        """Note that these blocks are entered; choose their masks, or take those chosen before, if not up front."""
        self._entered.update(block.index for block in blocks)
        if self.interleaved is None:
            return
        for block in blocks:
            masks, moved = self.interleaved.held(block), {}
            if masks is None or (self.start == "moved" and statistics):
                masks, moved = self.interleaved.prune(block, statistics)
            self.masks.add(masks)
            if self.start == "moved":
                self._starts |= moved

    def _fresh(self, window: Window) -> list[Block]:
        return [block for block in window.blocks if block.index not in self._entered]

    def _later_matrices(self, window: Window) -> dict[str, nn.Module]:
        """The pruned matrices of an MLP window, if their inputs were not known when its block was entered."""
        pruned = window.blocks[0].weights_among(self.masks)
        return {name: one for name, one in pruned.items() if name in window.owned and self._is_later(name)}

    def _is_later(self, name: str) -> bool:
        """Whether what enters this matrix is known only once attention is recovered."""
        return self.propagation != "dense" and isinstance(self._owner(name), MLPWindow)

    def _is_now(self, name: str) -> bool:
        """Whether the inputs of this matrix, just seen, are what its window needs."""
        owner = self._owner(name)
        if owner is None or owner not in self.own_windows:
            return False
        return not self._is_later(name) and owner not in self.files

    def _owner(self, name: str) -> Window | None:
        """The first window that recovers this parameter; None if none does, for nothing around it is pruned."""
        return next((window for window in self.windows if name in window.owned), None)

    def batch(self, walk: Activations, rows: Any) -> Batch:
        """Inputs and target of the current window for some of a walk's sequences."""
        batch = {"hidden": walk.load(walk.hidden, rows)}
        assert walk.output is not None
        if isinstance(self.window, GroupWindow):
            assert walk.recorded is not None
            return batch | {"target": walk.load(walk.recorded, rows)}
        if isinstance(self.window, AttentionWindow | MLPWindow):
            assert walk.attention is not None
            if isinstance(self.window, AttentionWindow):
                return batch | {"target": walk.load(walk.attention, rows)}
            batch["attention"] = walk.load(walk.attention, rows)
        return batch | {"target": walk.load(walk.output, rows)}

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the current window makes of its inputs and what it should, [batch, seq, dim] in fp32."""
        assert self.window is not None
        dtype = next(iter(self.window.blocks[0].parameters().values())).dtype
        inputs = {name: one.to(dtype) for name, one in batch.items() if name != "target"}
        output = self.window.forward(self.replay, inputs["hidden"], inputs.get("attention"))
        return output.float(), batch["target"].float()

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Squared error of the current window's output on held-out sequences, relative to its target's energy.

        Raises:
            FloatingPointError: If it is no number, naming the window and the batch.
        """
        assert self.window is not None
        sums = torch.zeros(2, dtype=torch.float64)
        batches = self.held_out.batches(self.held_out.rows(), partial(self.batch, self.held_out))
        for rows, batch in sampled(batches, "held-out error"):
            output, target = self.outputs(batch)
            error = (output - target).square().sum()
            check_finite(error, f"window {self.window.name}, held-out batch that begins with sequence {rows.start}")
            sums += torch.stack((error, target.square().sum())).cpu()
        return float(sums[0] / sums[1])

    def _begin_next(self) -> None:
        """Walk through windows that are written already, and begin the first that is not."""
        for window in self.own_windows[len(self.results) :]:
            if window not in self.files:
                break
            self._approach(window)
            self._take(window)
        self.phases.enter(f"window {window.name}")
        self.begin(window)
        self.window, self._epoch = window, 0
        self._before = self.held_out_error()

    def learn(self, names: Iterable[str]) -> None:
        """Have these parameters learn: the optimizer, which serves all windows in turn, holds them alone."""
        parameters = [self.model.get_parameter(name).requires_grad_(True) for name in names]
        self._optimizer().param_groups[0]["params"] = parameters

    def rest(self) -> None:
        """Freeze what learned; drop gradients and optimizer state, so that memory does not grow with depth."""
        optimizer = self._optimizer()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.requires_grad_(False)
            parameter.grad = None
        optimizer.state.clear()

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)  # pyright: ignore[reportReturnType]

    def end(self, window: Window) -> dict[str, Any]:
        """Let go of what only `window` needed; what is returned becomes part of its results."""
        return {}

    def _finish(self) -> None:
        """Check, write and leave the window under way."""
        window = self.window
        assert window is not None
        result = {"before": self._before, "after": self._after, **self.end(window)}
        self._precision.narrow()
        weights = {name: self.model.get_parameter(name).detach().cpu().contiguous() for name in window.owned}
        self._masks_of(window).check(self.model)
        self.files.write(window, weights, result)
        self._note(window)
        if self.logger is not None:
            metrics = {f"window/{name}": result[name] for name in ("before", "after")}
            self.logger.log_metrics(metrics, step=self.windows.index(window))
        self._leave(window, result)
        self.window = None

    def _take(self, window: Window) -> None:
        """Load the weights of a window that is written already."""
        if isinstance(window, GroupWindow):
            self._parking.keep_dense(window)
        with self.files.read(window) as (weights, result), torch.no_grad():
            for name, weight in weights:
                self.model.get_parameter(name).copy_(weight)
        self._note(window)
        self._begun.update(name for name in window.owned if name in self.masks)
        self._leave(window, result)

    def _note(self, window: Window) -> None:
        """Where blocks are read from disk, read the recovered weights from now on."""
        if self.residence is not None and self.residence.disk_weights is not None:
            self.residence.disk_weights.redirect(window.owned, self.files.path(window))

    def _leave(self, window: Window, result: dict[str, Any]) -> None:
        """Note the results; a group steps aside until all of its block are done, for they take dense inputs."""
        self.results[window.name] = result
        if isinstance(window, GroupWindow):
            self._parking.park(window)
            left = self.windows[self.windows.index(window) + 1 :]
            if not left or left[0].indices != window.indices:
                self._parking.clear()

    def _is_to_recover(self, window: Window) -> bool:
        if self.interleaved is not None:
            return any(name in self.interleaved.prunable for name in window.owned)
        return self._masks_of(window).num_pruned > 0

    def _require_propagation(self, windows: Sequence[Window]) -> None:
        """Refuse windows that need the dense weights of blocks that recovered inputs have passed."""
        blocks = [index for window in windows if not isinstance(window, MLPWindow) for index in window.indices]
        groups = any(isinstance(window, GroupWindow) for window in windows)
        if groups and self.propagation != "dense":
            raise ValueError(
                f"groups of matrices are recovered on dense inputs, got model.propagation: {self.propagation}; choose "
                f"model.propagation: dense"
            )
        if not groups and len(blocks) != len(set(blocks)) and self.propagation == "recovered_local":
            raise ValueError(
                "overlapping windows have no dense weights left for what a window makes of recovered inputs, got "
                "model.propagation: recovered_local; choose dense or recovered, or model.stride: null"
            )

    def _masks_of(self, window: Window) -> Masks:
        return self.masks.subset([name for name in window.owned if name in self.masks])


class WindowBatches:
    """Batches of a scope's current window, in a new order every epoch, decided by seed, window and epoch."""

    def __init__(self, scope: LocalScope) -> None:
        self.scope = scope

    def __len__(self) -> int:
        return -(-len(self.scope.data.tokens("train")) // self.scope.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        scope = self.scope
        assert scope.window is not None
        seed = derived_seed(scope.data.seed, scope.windows.index(scope.window), scope._epoch)
        order = torch.randperm(len(scope.calibration.hidden), generator=torch.Generator().manual_seed(seed))
        walk = scope.calibration
        yield from (batch for _, batch in walk.batches(order.split(scope.batch_size), partial(scope.batch, walk)))


def _larger(*needs: Observation) -> Observation:
    return max(needs, key=("none", "norms", "gram", "cross").index)
