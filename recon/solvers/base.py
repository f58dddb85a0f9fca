"""The interface of a solver of masked least squares."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.solvers.cholesky import dead_columns
from recon.solvers.least_squares import LeastSquares, exactly, require_finite


@dataclass
class Solution:
    """Solution of one matrix, measured on its fp32 weight.

    Args:
        weight: W, fp32, zero outside the mask.
        iterations: Number of iterations. Conjugate gradients iterate until the last row is finished or the solver
            stops; each iteration is one product of the unfinished rows with G.
        projected_gradient: ||M * R||_F / ||M * (W0 C)||_F, zero at the optimum.
        relative_error: ||X_r W^T - X_d W0^T||_F^2 / ||X_d W0^T||_F^2.
        seconds: Time of the solve.
    """

    weight: Float[Tensor, "out in_"]
    iterations: int
    projected_gradient: float
    relative_error: float
    seconds: float


class Solver(ABC):
    """Finds the weights of one matrix for a fixed mask, without a training loop.

    A new solver is one class with `iterate` and `__str__`; `solve` has the common part.
    """

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def iterate(
        self,
        problem: LeastSquares,
        keep: Bool[Tensor, "out in_"],
        start: Float[Tensor, "out in_"],
        residual: Float[Tensor, "out in_"],
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], int]:
        """Find W, within `exactly`.

        Args:
            problem: The problem; all its numbers are finite.
            keep: M, True = kept.
            start: First iterate, fp32 and zero outside the mask.
            residual: R of the start.
            name: Name of the matrix, for messages.

        Returns:
            W, a new tensor in fp32 and zero outside the mask, and the number of iterations.
        """

    def solve(
        self,
        problem: LeastSquares,
        keep: Bool[Tensor, "out in_"],
        start: Float[Tensor, "out in_"] | None = None,
        name: str = "the matrix",
    ) -> Solution:
        """Solve one matrix in fp32, whatever the autocast or TF32 setting; arguments stay as they are.

        No row gets worse than its start, and weights of inputs that never occurred (G_jj = 0) keep their start.

        Args:
            problem: The problem of the matrix.
            keep: M, True = kept.
            start: First iterate, pruned entries ignored; the dense weight by default.
            name: Name of the matrix, for messages.

        Raises:
            ValueError: If an argument holds NaN or Inf, or the result overflows fp32.
        """
        start = problem.dense if start is None else start
        problem = replace(problem)  # cached tensors, as large as the weight, are freed with this copy
        problem.require_finite(name)
        require_finite(name, start=start)  # waits for the device, so that earlier work is not timed
        begin = time.perf_counter()
        with exactly(problem.dense.device):
            W1 = start.float().masked_fill(~keep, 0)
            R = problem.residual(W1)
            before = problem.excess(W1, R)
            W, iterations = self.iterate(problem, keep, W1, R, name)
            W = torch.where(dead_columns(problem.gram), W1, W)
            R = problem.residual(W)
            after = problem.excess(W, R)
            require_finite(name, solution=W, objective=torch.stack([before, after, problem.energy]))
            # Rounding may lift a row that starts at its optimum, and damping one that starts near it.
            lifted = after > before
            if lifted.any():
                W = torch.where(lifted[:, None], W1, W)
                R = problem.residual(W)
            error, gradient = problem.measure(W, keep, R)
        return Solution(W, iterations, gradient, error, time.perf_counter() - begin)
