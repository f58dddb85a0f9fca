"""Matrix reconstruction: each pruned matrix by itself."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from recon.calibration.activations import Observation
from recon.calibration.statistics import InputStatistics
from recon.models.matrices import Matrix, parameters_of
from recon.models.windows import Window, block_windows
from recon.profiling.ledger import followed
from recon.scopes.base import StartName
from recon.scopes.local.module import LocalScope
from recon.scopes.optimization import warmup_and_linear_decay
from recon.scopes.trainer_options import NO_ACCUMULATION, NO_OPTIMIZER, TrainerOption
from recon.solvers import ConjugateGradients, GradientDescent, LeastSquares, Solver, relative_objective


class MatrixReconstruction(LocalScope):
    """Finds the surviving weights of every matrix that best reproduce its dense outputs.

    This is a convex problem. The Gram matrix of the inputs states it completely, for any number of tokens, and
    conjugate gradients solve it without a learning rate. The matrices of a block make one window, so that the hidden
    states walk through the model only once.

    Args:
        solver: `ConjugateGradients`, exact; `ADMMSolver`; or `GradientDescent`, steps of AdamW on the same problem, as
            published comparisons of scopes have it.
        start: First iterate, `pruned`, `moved` or that of another `run`. Where the solver is exact the end is the same,
            but for weights that the inputs do not determine.
        propagation: As in `LocalScope`; with `recovered`, inputs of the recovered model and outputs of the dense one.
        **options: Batch size, and which model: see `LocalScope`.
    """

    scope = "matrix"

    def __init__(
        self, solver: Solver | GradientDescent | None = None, start: StartName = "pruned", **options: Any
    ) -> None:
        super().__init__(epochs=1, start=start, **options)
        if start in ("exact", "auto"):
            raise ValueError(
                "model.start: exact is what the matrix scope ends at; choose model.start: pruned, or moved with a "
                "criterion that moves weights"
            )
        self.solver = solver or ConjugateGradients()
        self.automatic_optimization = isinstance(self.solver, GradientDescent)
        self._matrices: dict[str, Matrix] = {}
        self._problems: dict[str, LeastSquares] = {}
        self._solved: dict[str, dict[str, Any]] = {}
        self._num_tokens = 0  # of the statistics
        self._began = 0.0

    def refused_options(self) -> tuple[TrainerOption, ...]:
        """Those of local scopes, those of several batches, and without an optimizer those of gradients."""
        without = () if self.automatic_optimization else NO_OPTIMIZER
        return super().refused_options() + NO_ACCUMULATION + without

    def label_notes(self) -> list[str]:
        """As `LocalScope.label_notes`, and a solver that is not exact."""
        notes = [] if isinstance(self.solver, ConjugateGradients) else [str(self.solver)]
        return super().label_notes() + notes

    def carried(self, window: Window) -> list[str]:
        """As `LocalScope.carried`: matrices alone, which are solved for inputs behind the dense norms."""
        return [name for name in window.owned if name in self.masks]

    @property
    def needs(self) -> Observation:
        """Gram matrices; of dense and recovered inputs together where dense outputs meet recovered inputs."""
        return "cross" if self.propagation == "recovered" else "gram"

    def build_windows(self) -> Sequence[Window]:
        """Lay out one window per block."""
        return block_windows(self.replay.anatomy, 1)

    def configure_optimizers(self):
        """Make AdamW and its schedule where the solver is a gradient method; none elsewhere."""
        if not isinstance(self.solver, GradientDescent) or not self.windows:
            return []
        settings = self.solver
        first = self.model.get_parameter(self.windows[0].owned[0])  # in place of a block's matrices, until one begins
        optimizer = torch.optim.AdamW([first], lr=settings.lr, betas=settings.betas, weight_decay=0.0)
        schedule = warmup_and_linear_decay(optimizer, settings.steps, settings.warmup, period=settings.steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> list[int]:
        """Number the steps of a window: one, or those of a gradient method. All data is in the Gram matrices."""
        return list(range(self.solver.steps if isinstance(self.solver, GradientDescent) else 1))

    def observe(self, statistics: dict[str, InputStatistics]) -> None:
        """Pose the problem of each matrix, whose weight still is dense."""
        self._num_tokens = max((one.num_tokens for one in statistics.values()), default=self._num_tokens)
        self._matrices = self.replay.anatomy.weights_among(statistics)
        self._problems = {
            name: LeastSquares.of(found, self._matrices[name].weight.clone()) for name, found in statistics.items()
        }

    def begin(self, window: Window) -> None:
        """As `LocalScope.begin`; with a gradient method the matrices require gradients from now on."""
        super().begin(window)
        self._began = time.monotonic()
        if self.automatic_optimization:
            self.learn(parameters_of(self._matrices.values()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Solve every matrix of the block, or return the mean error of their outputs for a gradient step."""
        assert self.under_way is not None
        self.under_way.tokens = self._num_tokens
        if not isinstance(self.solver, GradientDescent):
            with followed("solve"):
                return self._solve(self.solver)
        errors = [relative_objective(one, self._learning(name)) for name, one in self._problems.items()]
        loss = torch.stack(errors).mean()
        self.log_loss("matrix_error", loss, f"window {self.under_way.window.name}, step {batch_idx}")
        return loss

    @torch.no_grad()
    def _solve(self, solver: Solver) -> None:
        for name, problem in self._problems.items():
            weight = self._matrices[name].weight
            solution = solver.solve(problem, self._keep(name), weight.float(), name)
            weight.copy_(solution.weight)
            self._solved[name] = {key: value for key, value in asdict(solution).items() if key != "weight"}
        errors = [one["relative_error"] for one in self._solved.values()]
        self.log("matrix_error", sum(errors) / max(1, len(errors)))

    @torch.no_grad()
    def end(self, window: Window) -> dict[str, Any]:
        """Drop dense weights and Gram matrices; report how well each matrix was solved."""
        if isinstance(self.solver, GradientDescent):
            self._end_descent(self.solver)
        solved, self._problems, self._solved, self._num_tokens = self._solved, {}, {}, 0
        self._matrices = {}
        return {"matrices": solved}

    def _end_descent(self, solver: GradientDescent) -> None:
        for name, problem in self._problems.items():
            error, gradient = problem.measure(self._matrices[name].weight.float(), self._keep(name))
            self._solved[name] = {
                "iterations": solver.steps,
                "projected_gradient": gradient,
                "relative_error": error,
                "seconds": (time.monotonic() - self._began) / len(self._problems),  # all are solved at once
            }
        self.rest()

    def _learning(self, name: str) -> Tensor:
        """Its weight, out x in, with the gradient that `Matrix.weight` leaves out."""
        matrix = self._matrices[name]
        return matrix.part_of(matrix.parameter)

    def _keep(self, name: str) -> Tensor:
        return self.masks.of(self._matrices[name], self.device)
