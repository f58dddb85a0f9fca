"""What the local scopes share: one `Trainer.fit` that goes through the model window by window.

A window takes `epochs` consecutive Lightning epochs. Its inputs and targets come from the dense model,
so windows do not depend on each other: a finished one is written to the run directory at once, and a
restarted run skips what is there, recomputing only the activations, and ends bit-identically.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recon.activations import Activations
from recon.anatomy import Anatomy
from recon.atomic import atomic_write, write_json
from recon.data import TokenData
from recon.masks import Masks
from recon.replay import Replay
from recon.scopes.base import Scope, check_finite
from recon.seeds import derived_seed
from recon.windows import AttentionWindow, MLPWindow, Window

Batch = dict[str, Tensor]


class LocalScope(Scope):
    """Recovers window after window, each against the dense model's activations.

    Args:
        epochs: Passes over the calibration sequences, for each window.
        batch_size: Sequences per step, and per forward pass of the dense model.
        **options: Which model: see `Scope`.

    Attributes:
        windows: All windows that hold a pruned weight, in the order of depth; laid out by `prepare`. The
            others reproduce the dense model as they are: training could only move them away from it.
        window: The one under way; None between two.
        results: Name of each finished window -> relative held-out error of its output `before` (as it
            starts) and `after` recovery, and what a scope adds.
    """

    def __init__(self, epochs: int = 4, batch_size: int = 8, **options: Any) -> None:
        super().__init__(epochs=epochs, **options)
        if batch_size < 1:
            raise ValueError(f"model.batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.windows: Sequence[Window] = []
        self.window: Window | None = None
        self.results: dict[str, dict[str, Any]] = {}
        self._epoch = 0
        self._before = self._after = 0.0

    @abstractmethod
    def build_windows(self) -> Sequence[Window]:
        """The windows in the order of depth, which together own every masked weight."""

    @property
    def max_epochs(self) -> int:
        """Epochs of the windows that are not written yet."""
        return self.epochs * sum(not self._is_written(window) for window in self.windows)

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

    def enforced(self) -> Masks:
        """The masks of finished windows and of the one under way."""
        begun = [window for window in self.windows if window.name in self.results or window is self.window]
        return self.masks.subset([name for window in begun for name in window.owned if name in self.masks])

    def prepare(
        self,
        data: TokenData,
        masks: Masks,
        directory: Path | None = None,
        moved: Mapping[str, Tensor] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """As `Scope.prepare`; lays out the windows and freezes the model.

        Raises:
            ValueError: If the model cannot be run window by window, or no window owns a masked weight.
        """
        super().prepare(data, masks, directory, moved, say)
        self.model.requires_grad_(False)
        self.replay = Replay(self.model, Anatomy.of(self.model))
        windows = self.build_windows()
        self.windows = [window for window in windows if self._masks_of(window).num_pruned]
        self.window, self.results = None, {}
        owned = {name for window in windows for name in window.owned}
        orphans = [name for name in masks if name not in owned]
        if orphans:
            raise ValueError(
                f"every pruned weight must belong to one window, got {len(orphans)} that belong to none, "
                f"{orphans[0]} the first; exclude them with `pruning.exclude` or choose scopes/block"
            )

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
        train, validation = self.data.tokens("train"), self.data.tokens("validation")
        self.calibration = Activations(self.replay, train, self.batch_size, self.device)
        self.held_out = Activations(self.replay, validation, self.batch_size, self.device)

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
        """Take in finished windows that lie behind the last one trained, write all results, free the activations.

        Raises:
            RuntimeError: If the trainer stopped before the last window.
        """
        for window in self.windows[len(self.results) :]:
            if not self._is_written(window):
                raise RuntimeError(
                    f"a fit needs to go through all {len(self.windows)} windows, it stopped before the end of "
                    f"{window.name}; start it again, without trainer.max_time or a callback that stops it"
                )
            self._take(window)
        super().on_fit_end()
        if self.directory is not None:
            write_json(self.directory / "windows.json", self.results)
        del self.calibration, self.held_out

    def begin(self, window: Window) -> None:
        """Compute what the dense window takes in and returns, then prune its weights, the others as they start."""
        self.calibration.enter(window.indices)
        self.begin_from_start(self._masks_of(window))

    def batch(self, walk: Activations, rows: Any) -> Batch:
        """Inputs and target of the current window for some of a walk's sequences."""
        batch = {"hidden": walk.hidden[rows]}
        assert walk.output is not None
        if isinstance(self.window, AttentionWindow | MLPWindow):
            assert walk.attention is not None
            if isinstance(self.window, AttentionWindow):
                return batch | {"target": walk.attention[rows]}
            batch["attention"] = walk.attention[rows]
        return batch | {"target": walk.output[rows]}

    def squared_error(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared error of the current window's output and its target's energy, fp32 scalars."""
        assert self.window is not None
        output = self.window.forward(self.replay, batch["hidden"], batch.get("attention"))
        target = batch["target"].float()
        return (output.float() - target).square().sum(), target.square().sum()

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Squared error of the current window's output on held-out sequences, relative to its target's energy.

        Raises:
            FloatingPointError: If it is no number, naming the window and the batch.
        """
        assert self.window is not None
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(self.held_out.hidden), self.batch_size):
            batch = self.batch(self.held_out, slice(start, start + self.batch_size))
            error, energy = self.squared_error(batch)
            check_finite(error, f"window {self.window.name}, held-out batch that begins with sequence {start}")
            sums += torch.stack((error, energy)).cpu()
        return float(sums[0] / sums[1])

    def _begin_next(self) -> None:
        """Pass the dense model through windows that are written already, and begin the first that is not."""
        for window in self.windows[len(self.results) :]:
            if not self._is_written(window):
                break
            self.calibration.enter(window.indices)
            self.held_out.enter(window.indices)
            self._take(window)
        self.phases.enter(f"window {window.name}")
        self.held_out.enter(window.indices)
        self.begin(window)
        self.window, self._epoch = window, 0
        self._before = self.held_out_error()

    def end(self, window: Window) -> dict[str, Any]:
        """Let go of what only `window` needed; what is returned becomes part of its results."""
        return {}

    def _finish(self) -> None:
        """Check, write and leave the window under way."""
        window = self.window
        assert window is not None
        result = {"before": self._before, "after": self._after, **self.end(window)}
        weights = {name: self.model.get_parameter(name).detach().cpu().contiguous() for name in window.owned}
        self._masks_of(window).check(self.model)
        if self.directory is not None:
            with atomic_write(self._file(window)) as temporary:
                save_file(weights, temporary, {"result": json.dumps(result)})
        if self.logger is not None:
            metrics = {f"window/{name}": result[name] for name in ("before", "after")}
            self.logger.log_metrics(metrics, step=self.windows.index(window))
        self.results[window.name] = result
        self.window = None

    def _take(self, window: Window) -> None:
        """Load the weights of a window that is written already."""
        with safe_open(self._file(window), framework="pt") as file, torch.no_grad():
            for name in window.owned:
                self.model.get_parameter(name).copy_(file.get_tensor(name))
            self.results[window.name] = json.loads(file.metadata()["result"])

    def _masks_of(self, window: Window) -> Masks:
        return self.masks.subset([name for name in window.owned if name in self.masks])

    def _is_written(self, window: Window) -> bool:
        return self.directory is not None and self._file(window).exists()

    def _file(self, window: Window) -> Path:
        assert self.directory is not None
        return self.directory / "windows" / f"{window.name}.safetensors"


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
        for rows in order.to(scope.device).split(scope.batch_size):
            yield scope.batch(scope.calibration, rows)
