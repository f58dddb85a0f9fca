"""A scope over windows as a caller sees it: its options, windows, results and label. The fit is in `module`."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch

from recon.calibration.activations import Propagation
from recon.calibration.storage import Budget, Place, Storage
from recon.distributed.part import Share
from recon.distributed.strategies import WindowParallelStrategy
from recon.models.windows import Window
from recon.pruning.interleaved import Interleaved
from recon.scopes.base import Scope
from recon.scopes.local.schedule import Schedule, require_independent
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.local.window_progress import WindowProgress


class WindowedScope(Scope):
    """Recovers window after window, each against the dense model's activations.

    Of each window the better of start and end is kept, by the error on the `data.num_validation` held-out sequences, of
    which there is at least one. An end that is worse is discarded with a line in the log.

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
            At most two copies exist at a time, and one of attention's outputs: on the device, they would be most of a
            small window's peak, and a submodule would need more of it than a block.
        activations_budget: Memory for copies on the device of each process, for `auto`, such as 4GiB; none if null.
        activations_host_budget: Memory for copies on the host, in each process, for `auto`; if null, each copy may
            take half of what is available.
        activations_dtype: Dtype of the copies; that of the model if null.
        **options: Which model: see `Scope`.

    Attributes:
        schedule: The windows and the progress through them; laid out by `prepare`.
        under_way: Progress of the window under way; None between two.
    """

    by_window = True

    def __init__(
        self,
        epochs: int = 4,
        batch_size: int = 8,
        propagation: Propagation = "dense",
        activations: Place = "auto",
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
        self.under_way: WindowProgress | None = None
        self.interleaved: Interleaved | None = None

    def settle(self, device: torch.device) -> None:
        """As `Scope.settle`: windows are widened to train, so a GPU may hold the model as it is stored."""
        self.source = self.source.on(device)

    @property
    def window(self) -> Window | None:
        """The window under way; None between two."""
        return self.under_way and self.under_way.window

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
        """Per finished window its held-out error `before` and `after`, `tokens`, `seconds` of the run, and more.

        A window that ended worse than it began has kept its start: `after` is then the error of that, and `discarded`
        that of the end.
        """
        return self.schedule.results

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
        if self.under_way is None:
            return f"window {len(self.results)}/{len(self.windows)}"
        window, epoch = self.under_way.window, self.under_way.epoch
        passes = f"  epoch {epoch}/{self.epochs}" if self.epochs > 1 else ""
        return f"window {self.schedule.index(window) + 1}/{len(self.windows)}  {window.name}{passes}"

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
        return list(self.masks if self.interleaved is None else self.interleaved.parameters)

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
