"""Gradient descent on masked least squares: the settings of a training loop elsewhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GradientDescent:
    """AdamW on `relative_objective`, with a full-batch gradient in each step.

    A training loop runs the steps - Lightning's, in the matrix scope - so this is no `Solver`: it has no `solve`. There
    is no weight decay: weights that no input determines have a gradient of zero and keep their start.

    Args:
        steps: Gradient steps for each matrix.
        lr: Peak learning rate.
        betas: AdamW's averaging coefficients.
        warmup: Share of the steps with a rising learning rate; it falls linearly to zero afterwards.
    """

    steps: int = 200
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and 0 < self.lr < float("inf")):
            raise ValueError(
                f"gradient descent needs steps >= 1 and a finite lr > 0, got {self.steps} and {self.lr}; "
                "200 and 1e-3 are a beginning"
            )
        if not (all(0 <= beta < 1 for beta in self.betas) and 0 <= self.warmup < 1):
            raise ValueError(
                f"gradient descent needs betas and warmup of at least 0 and below 1, got {self.betas} and "
                f"{self.warmup}; (0.9, 0.95) and 0.1 are the distillation's"
            )

    def __str__(self) -> str:
        return "gradient descent"
