"""The schedule of a local scope: the windows to recover, their order, and the progress through them.

A schedule knows names, blocks and windows. It holds no tensor and knows no trainer, so every decision of a fit over
windows can be tested without one.
"""

from collections.abc import Collection, Container, Iterable, Sequence
from typing import Any

from recon.calibration.activations import Propagation
from recon.distributed.part import Share
from recon.models.anatomy import Block
from recon.models.windows import Window


class Schedule:
    """The windows of one fit.

    Args:
        windows: All windows of the model, in the order of depth.
        maskable: Names of the parameters that have a mask, or get one during the fit.
        pruned: Names of the parameters that lose a weight by their masks.
        share: Part of the windows that this process recovers.
        propagation: What enters a window, and what it should produce.
        written: The windows whose recovered weights are in the run directory.

    Attributes:
        windows: All windows with a pruned weight, in the order of depth. The others reproduce the dense model as they
            are: training could only move them away from it.
        own: Those of them that this process recovers.
        results: Results of each finished window under its name, in the order in which they finished.
        begun: Names of the masked parameters that are pruned by now, in the order in which their windows began.

    Raises:
        ValueError: If a maskable parameter belongs to no window, or a window needs dense weights that will be gone.
    """

    def __init__(
        self,
        windows: Sequence[Window] = (),
        maskable: Sequence[str] = (),
        pruned: Collection[str] = (),
        share: Share | None = None,
        propagation: Propagation = "dense",
        written: Container[Window] = (),
    ) -> None:
        require_propagation(windows, propagation)
        require_owners({name for window in windows for name in window.owned}, maskable)
        self.windows = [window for window in windows if any(name in pruned for name in window.owned)]
        self.own = (share or Share()).select(self.windows)
        self.propagation: Propagation = propagation
        self.results: dict[str, dict[str, Any]] = {}
        self._written = written
        self._found = {window.name for window in self.own if window in written}
        self._entered: set[int] = set()
        self._begun: dict[str, None] = {}
        self._owners: dict[str, Window] = {}
        for window in self.windows:
            for name in window.owned:
                self._owners.setdefault(name, window)

    @property
    def begun(self) -> list[str]:
        """See the class."""
        return list(self._begun)

    def index(self, window: Window) -> int:
        """Return the number of a window among all, from 0."""
        return self.windows.index(window)

    def starts(self) -> set[int]:
        """Return the index of the first block of every own window."""
        return {window.indices[0] for window in self.own}

    def missing(self, windows: Sequence[Window]) -> list[Window]:
        """List those of `windows` that are not written yet."""
        return [window for window in windows if window not in self._written]

    def unfinished(self, windows: Sequence[Window]) -> list[Window]:
        """List those of `windows` that this process has neither recovered nor loaded."""
        return [window for window in windows if window.name not in self.results]

    def require_written(self, windows: Sequence[Window]) -> None:
        """Refuse to end a fit before all of `windows` are finished or written.

        Raises:
            RuntimeError: Naming the first that is not.
        """
        if missing := self.missing(self.unfinished(windows)):
            raise RuntimeError(
                f"a fit needs to go through all {len(self.windows)} windows, it stopped before the end of "
                f"{missing[0].name}; start it again, without trainer.max_time or a callback that stops it"
            )

    def upcoming(self) -> tuple[list[Window], Window | None]:
        """Return the written windows in front of the next one to recover, and that one; None if all are written.

        Other processes may write windows meanwhile. What is written is looked up here alone, so that everything up to
        the next window follows from one view of the directory.
        """
        left = self.unfinished(self.own)
        missing = self.missing(left)
        names = {window.name for window in missing}
        self._found = {window.name for window in self.own if window.name not in names}
        return (left[: left.index(missing[0])], missing[0]) if missing else (left, None)

    def owner(self, name: str) -> Window | None:
        """Return the first window that recovers a parameter; None if all that share a window with it are dense."""
        return self._owners.get(name)

    def is_known_later(self, name: str) -> bool:
        """Tell whether the recovered inputs of a matrix are known only after attention in its block is recovered."""
        owner = self.owner(name)
        return self.propagation != "dense" and owner is not None and owner.takes_attention

    def known_later(self, window: Window, masked: Container[str]) -> list[str]:
        """List the masked parameters of a window whose inputs are known only after attention is recovered."""
        return [name for name in window.owned if name in masked and self.is_known_later(name)]

    def is_known_now(self, name: str) -> bool:
        """Tell whether the inputs of a matrix, collected as its block is entered, serve a window to be recovered."""
        owner = self.owner(name)
        if owner is None or owner not in self.own or owner.name in self._found:
            return False
        return not self.is_known_later(name)

    def enter(self, window: Window) -> list[Block]:
        """Note that the activations reach a window; return those of its blocks that they had not reached before."""
        fresh = [block for block in window.blocks if block.index not in self._entered]
        self._entered.update(block.index for block in fresh)
        return fresh

    def begin(self, window: Window, masked: Container[str]) -> list[str]:
        """Note that a window begins, or that its recovered weights are loaded.

        Args:
            window: The window.
            masked: Names of the parameters that have a mask by now.

        Returns:
            Names of its masked parameters that no earlier window has begun, which are to be pruned.
        """
        names = [name for name in window.owned if name in masked and name not in self._begun]
        self._begun |= dict.fromkeys(names)
        return names

    def finish(self, window: Window, result: dict[str, Any]) -> None:
        """Note the results of a window that was recovered or loaded."""
        self.results[window.name] = result

    def release(self) -> None:
        """Forget the windows, which hold blocks of the model; the results stay."""
        self.windows, self.own, self._owners = [], [], {}

    def is_last_of_block(self, window: Window) -> bool:
        """Tell whether the next window lies in other blocks."""
        following = self.windows[self.index(window) + 1 :]
        return not following or following[0].indices != window.indices


def require_independent(propagation: Propagation, what: str) -> None:
    """Refuse recovered inputs where windows must not depend on each other.

    Args:
        propagation: What enters a window.
        what: The option that needs independent windows, in the words of the message.

    Raises:
        ValueError: If recovered weights enter a window.
    """
    if propagation != "dense":
        raise ValueError(
            f"{what} needs windows that do not depend on each other, got model.propagation: {propagation}, "
            f"where what enters a window has passed the recovered ones before it; choose model.propagation: dense"
        )


def require_recovered_inputs(propagation: Propagation) -> None:
    """Refuse dense inputs where masks are chosen from recovered ones.

    Raises:
        ValueError: If the inputs of windows are those of the dense model.
    """
    if propagation == "dense":
        raise ValueError(
            "pruning.inputs: recovered chooses masks from recovered inputs, got model.propagation: dense, which "
            "has none; choose model.propagation: recovered or recovered_local, or pruning.inputs: dense"
        )


def require_propagation(windows: Sequence[Window], propagation: Propagation) -> None:
    """Refuse windows that need the dense weights of blocks that are recovered already.

    Raises:
        ValueError: If recovered inputs meet groups of matrices, or `recovered_local` meets overlapping windows.
    """
    if propagation == "dense":
        return
    if any(window.needs_dense_block for window in windows):
        require_dense_inputs(propagation)
    blocks = [index for window in windows if not window.takes_attention for index in window.indices]
    if len(blocks) != len(set(blocks)) and propagation == "recovered_local":
        raise ValueError(
            "overlapping windows have no dense weights left for what a window makes of recovered inputs, got "
            "model.propagation: recovered_local; choose dense or recovered, or model.stride: null"
        )


def require_dense_inputs(propagation: Propagation) -> None:
    """Refuse recovered inputs of groups of matrices.

    Raises:
        ValueError: If recovered weights enter a group.
    """
    if propagation != "dense":
        raise ValueError(
            f"groups of matrices are recovered on dense inputs, got model.propagation: {propagation}; choose "
            f"model.propagation: dense"
        )


def require_owners(owned: Collection[str], maskable: Iterable[str]) -> None:
    """Refuse pruned weights that no window recovers.

    Args:
        owned: Names of the parameters of all windows.
        maskable: Names of the parameters that have a mask, or get one during the fit.

    Raises:
        ValueError: Naming the first weight without a window.
    """
    if orphans := [name for name in maskable if name not in owned]:
        raise ValueError(
            f"every pruned weight must belong to one window, got {len(orphans)} that belong to none, "
            f"{orphans[0]} the first; exclude them with `pruning.exclude` or choose scopes/block"
        )
