"""The contract of a solver of masked least squares."""

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
    """What a solver found, measured on the fp32 weight that it returns.

    Args:
        weight: W, fp32, zero outside the mask.
        iterations: How many were made. Of conjugate gradients, until the last row was finished or the solver stopped;
            each is one product of the rows unfinished with G.
        projected_gradient: ||M * R||_F / ||M * (W0 C)||_F, zero at the optimum.
        relative_error: ||X_r W^T - X_d W0^T||_F^2 / ||X_d W0^T||_F^2.
        seconds: That it took.
    """

    weight: Float[Tensor, "out in_"]
    iterations: int
    projected_gradient: float
    relative_error: float
    seconds: float


class Solver(ABC):
    """Finds the weights of one matrix for a fixed mask, without a training loop.

    A new solver is one class with `iterate` and `__str__`; what holds for all of them is in `solve`.
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
            problem: All of it finite.
            keep: M, True = kept.
            start: First iterate, fp32 and zero outside the mask.
            residual: R of the start.
            name: What messages call the matrix.

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
        """Solve one matrix in fp32, whichever autocast or TF32 setting holds; what is received is left as it is.

        No row is returned worse than it started, and weights of inputs that never occurred (G_jj = 0) stay as they
        started.

        Args:
            problem: Of the matrix.
            keep: M, True = kept.
            start: First iterate, pruned entries ignored; the dense weight by default.
            name: What messages call the matrix.

        Raises:
            ValueError: If an argument holds NaN or Inf, or the result overflows fp32.
        """
        start = problem.dense if start is None else start
        problem = replace(problem)  # what it computes on the way, as large as the weight, is freed with this copy
        problem.require_finite(name)
        require_finite(name, start=start)  # reading the answer waits for what the device was still doing
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
