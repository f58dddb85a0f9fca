"""Masked least squares: the problem of one matrix for a fixed mask.

With W0 the dense weight, X_d the dense model's inputs, X_r the inputs that the matrix gets and M the mask, minimise
||X_r W^T - X_d W0^T||_F^2 over W = M * W. The rows are independent convex problems, and G = X_r^T X_r, C = X_d^T X_r
and G_d = X_d^T X_d hold the inputs completely. Where both inputs are the same, C = G_d = G, and what is minimised is
tr((W - W0) G (W - W0)^T).

Everything is written with E = W0 - W, the residual R = W0 C - W G = E G + B and the drift B = W0 (C - G), which is
zero if the inputs are the same: differences come first, for W0 C and W G cancel near the optimum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, full_fp32


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The problem of one matrix, in fp32 whatever is received.

    Args:
        gram: G, the sum over tokens of x_r x_r^T.
        dense: W0.
        cross: C, the sum over tokens of x_d x_r^T; None if x_d = x_r.
        dense_gram: G_d, the sum over tokens of x_d x_d^T; with `cross` only.
    """

    gram: Float[Tensor, "in_ in_"]
    dense: Float[Tensor, "out in_"]
    cross: Float[Tensor, "in_ in_"] | None = None
    dense_gram: Float[Tensor, "in_ in_"] | None = None

    def __post_init__(self) -> None:
        assert (self.cross is None) == (self.dense_gram is None), "C and G_d come together"
        for field, tensor in self._tensors().items():
            object.__setattr__(self, field, tensor.float())

    @classmethod
    def of(cls, statistics: InputStatistics, dense: Float[Tensor, "out in_"]) -> "LeastSquares":
        """Pose the problem from statistics of `collect(..., need="gram")` or `collect_pairs`."""
        assert statistics.gram is not None, 'least squares need statistics collected with need="gram"'
        return cls(statistics.gram, dense, statistics.cross, statistics.dense_gram)

    @cached_property
    def target(self) -> Float[Tensor, "out in_"]:
        """W0 C, the residual of W = 0."""
        with exactly(self.dense.device):
            return self.dense @ (self.gram if self.cross is None else self.cross)

    @cached_property
    def energy(self) -> Float[Tensor, "out"]:
        """||X_d w0||^2 of each row, the reference of relative errors."""
        with exactly(self.dense.device):
            return (self.dense * (self.target if self.dense_gram is None else self.dense @ self.dense_gram)).sum(1)

    @cached_property
    def drift(self) -> Float[Tensor, "out in_"] | None:
        """B; None if the inputs are the same."""
        if self.cross is None:
            return None
        with exactly(self.dense.device):
            return self.dense @ (self.cross - self.gram)

    @cached_property
    def drift_energy(self) -> Float[Tensor, "out"] | None:
        """||(X_r - X_d) w0||^2 of each row, the objective of W = W0; None if the inputs are the same."""
        if self.cross is None or self.dense_gram is None or self.drift is None:
            return None
        with exactly(self.dense.device):
            return (self.dense * (self.dense @ (self.dense_gram - self.cross.T) - self.drift)).sum(1)

    def residual(self, weight: Float[Tensor, "out in_"]) -> Float[Tensor, "out in_"]:
        """R, minus half the gradient of the objective. As exact as the caller's context: see `exactly`."""
        R = (self.dense - weight) @ self.gram
        return R if self.drift is None else R + self.drift

    def excess(self, weight: Float[Tensor, "out in_"], residual: Float[Tensor, "out in_"]) -> Float[Tensor, "out"]:
        """Excess of each row's objective over that of W0: e G e^T + 2 e b^T, for R given."""
        E = self.dense - weight
        return (E * (residual if self.drift is None else residual + self.drift)).sum(1)

    def measure(
        self,
        weight: Float[Tensor, "out in_"],
        keep: Bool[Tensor, "out in_"],
        residual: Float[Tensor, "out in_"] | None = None,
    ) -> tuple[float, float]:
        """Measure the error of a weight.

        Args:
            weight: W, zero outside the mask.
            keep: M, True = kept.
            residual: R of this weight, if it is known.

        Returns:
            The relative error ||X_r W^T - X_d W0^T||_F^2 / ||X_d W0^T||_F^2, and the projected gradient
            ||M * R||_F / ||M * (W0 C)||_F, zero at the optimum.
        """
        with exactly(self.dense.device):
            W, M = weight.float(), keep.float()
            R = self.residual(W) if residual is None else residual
            error = self.excess(W, R).sum()
            if self.drift_energy is not None:
                error = (error + self.drift_energy.sum()).clamp(min=0)  # rounding; no error is negative
            scale = (self.target * M).norm(dim=1).norm()
            return _ratio(error, self.energy.sum()), _ratio((R * M).norm(), scale)

    def require_finite(self, name: str) -> None:
        """Refuse NaN and Inf, naming the matrix.

        Raises:
            ValueError: If a tensor of the problem holds any.
        """
        require_finite(name, **self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"gram": self.gram, "dense": self.dense, "cross": self.cross, "dense_gram": self.dense_gram}
        return {field: tensor for field, tensor in tensors.items() if tensor is not None}


def relative_objective(problem: LeastSquares, weight: Float[Tensor, "out in_"]) -> Float[Tensor, ""]:
    """The relative error that `LeastSquares.measure` reports, in fp32 and differentiable by the weight.

    Inputs that never occurred have a gradient of exactly zero. The caller multiplies with the mask.
    """
    with full_fp32(problem.dense.device):
        W = weight.float()
        objective = problem.excess(W, problem.residual(W)).sum()
        if problem.drift_energy is not None:
            objective = objective + problem.drift_energy.sum()
        energy = problem.energy.sum()
        return objective / torch.where(energy > 0, energy, 1)


def require_finite(name: str, **tensors: Tensor) -> None:
    """Refuse NaN and Inf in arguments and results of a solver for the matrix `name`."""
    for argument, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"the solver needs finite numbers in fp32, got NaN or Inf in `{argument}` of `{name}`; check "
                "the weights and the calibration inputs of this matrix"
            )


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Full fp32 and no graph; tensors made here may be used by one, even if inference mode holds outside."""
    with torch.inference_mode(False), torch.no_grad(), full_fp32(device):
        yield


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The quotient; 0 / 0 is 0, for a matrix without inputs is exact."""
    return 0.0 if numerator == 0 else float(numerator / denominator)
