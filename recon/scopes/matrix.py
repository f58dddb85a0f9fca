"""Matrix reconstruction: each pruned matrix by itself, exactly."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from recon.exact import MAX_ITERATIONS, TOLERANCE, pruned_matrices, solve
from recon.scopes.base import StartName
from recon.scopes.local import LocalScope
from recon.shapes import weight_out_in
from recon.statistics import InputStatistics, collect
from recon.windows import Window, block_windows


class MatrixReconstruction(LocalScope):
    """The surviving weights of every matrix that best reproduce its outputs on the dense model's inputs.

    That is a convex problem which the Gram matrix of the inputs holds completely: it is solved by
    conjugate gradients, without a learning rate and whatever the number of tokens. The matrices of a
    block make one window and one step, so that the dense model is walked only once.

    Args:
        tolerance: Relative projected gradient at which a matrix counts as solved.
        max_iterations: Conjugate-gradient steps after which it is taken as it is.
        start: First iterate, `pruned` or `moved`. The end is the same, but for weights that the inputs do not
            determine.
        **options: Batch size, and which model: see `LocalScope`.
    """

    scope = "matrix"

    def __init__(
        self,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
        start: StartName = "pruned",
        **options: Any,
    ) -> None:
        super().__init__(epochs=1, start=start, **options)
        if start == "exact":
            raise ValueError(
                "model.start: exact is what the matrix scope ends at; choose model.start: pruned, or moved with a "
                "criterion that moves weights"
            )
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.automatic_optimization = False
        self._dense: dict[str, Tensor] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._matrices: dict[str, nn.Module] = {}
        self._solved: dict[str, dict[str, Any]] = {}

    def build_windows(self) -> Sequence[Window]:
        """One window a block."""
        return block_windows(self.replay.anatomy, 1)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """No optimizer: the solution is exact."""
        return []

    def train_dataloader(self) -> list[int]:
        """One step a window: all that it needs is in the Gram matrices."""
        return [0]

    def begin(self, window: Window) -> None:
        """As `LocalScope.begin`, collecting Gram matrices on the way and keeping the dense weights."""
        (block,) = window.blocks
        self._matrices = pruned_matrices(block, self.masks)
        with collect(self._matrices, need="gram") as self._statistics:
            self.calibration.enter(window.indices)
        self._dense = {name: weight_out_in(matrix).clone() for name, matrix in self._matrices.items()}
        super().begin(window)

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Solve every matrix of the block."""
        solved = {}
        for name, dense in self._dense.items():
            module, keep = self._matrices[name], self.masks[name]
            limits = self.tolerance, self.max_iterations
            solution = solve(module, dense, self._statistics[name], keep, name, *limits)
            weight_out_in(module).copy_(solution.weight)
            solved[name] = {key: value for key, value in asdict(solution).items() if key != "weight"}
        self.log("matrix_error", sum(one["relative_error"] for one in solved.values()) / max(1, len(solved)))
        self._solved = solved

    def end(self, window: Window) -> dict[str, Any]:
        """Drop dense weights and Gram matrices; report how well each matrix was solved."""
        self._dense, self._statistics, self._matrices = {}, {}, {}
        return {"matrices": self._solved}
