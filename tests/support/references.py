"""Slow, obvious versions of what recon computes: loops, Python sorting, dense fp64 algebra.

They share no code with recon, so a mistake would have to be made twice.
"""

import torch
from torch import Tensor


def keep_highest(scores: list[float], num_kept: int) -> list[bool]:
    """Keep the highest scores; among equals the lower index."""
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = set(ranking[:num_kept])
    return [i in kept for i in range(len(scores))]


def keep_per_row(scores: Tensor, num_kept: int) -> Tensor:
    return torch.tensor([keep_highest(row, num_kept) for row in scores.tolist()])


def keep_per_group(scores: Tensor, keep: int, of: int) -> Tensor:
    rows = []
    for row in scores.tolist():
        groups = [row[i : i + of] for i in range(0, len(row), of)]
        rows.append([kept for group in groups for kept in keep_highest(group, keep)])
    return torch.tensor(rows)


def gram(inputs: Tensor) -> Tensor:
    """The sum over tokens of x x^T, fp64."""
    tokens = inputs.double().reshape(-1, inputs.shape[-1])
    total = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    for x in tokens:
        total += torch.outer(x, x)
    return total


def masked_least_squares(dense: Tensor, inputs: Tensor, keep: Tensor, dense_inputs: Tensor | None = None) -> Tensor:
    """For each row the least-squares fit of the dense outputs by the kept inputs, fp64.

    The dense outputs are those of `dense_inputs`, if these are others.
    """
    tokens = inputs.double().reshape(-1, inputs.shape[-1])
    dense_tokens = tokens if dense_inputs is None else dense_inputs.double().reshape(-1, inputs.shape[-1])
    weight = torch.zeros(dense.shape, dtype=torch.float64)
    for row in range(len(dense)):
        kept = keep[row].nonzero().flatten()
        outputs = dense_tokens @ dense[row].double()
        # gelsd: the driver that allows kept inputs to be linearly dependent
        weight[row, kept] = torch.linalg.lstsq(tokens[:, kept], outputs[:, None], driver="gelsd").solution[:, 0]
    return weight


def relative_error(weight: Tensor, dense: Tensor, inputs: Tensor) -> float:
    """||X (W - W0)^T||^2 / ||X W0^T||^2, from the outputs themselves, fp64."""
    tokens = inputs.double().reshape(-1, inputs.shape[-1])
    difference = tokens @ (weight.double() - dense.double()).T
    return float(difference.square().sum() / (tokens @ dense.double().T).square().sum())


def projected_gradient(weight: Tensor, dense: Tensor, inputs: Tensor, keep: Tensor) -> float:
    """||M * ((W - W0) G)||_F / ||M * (W0 G)||_F, fp64."""
    G = gram(inputs)
    gradient = ((weight.double() - dense.double()) @ G)[keep]
    return float(gradient.norm() / (dense.double() @ G)[keep].norm())


def cross_errors(weight: Tensor, dense: Tensor, inputs: Tensor, dense_inputs: Tensor) -> Tensor:
    """||X w - X_d w0||^2 of each row, from the outputs themselves, fp64."""
    outputs, dense_outputs = inputs.double() @ weight.double().T, dense_inputs.double() @ dense.double().T
    return (outputs - dense_outputs).square().sum(0)


def cross_gradient(weight: Tensor, dense: Tensor, inputs: Tensor, dense_inputs: Tensor, keep: Tensor) -> float:
    """||M * (Y^T X)||_F of the errors Y = X W^T - X_d W0^T, relative to that of W = 0, fp64."""
    dense_outputs = dense_inputs.double() @ dense.double().T
    error = inputs.double() @ weight.double().T - dense_outputs
    return float((error.T @ inputs.double())[keep].norm() / (dense_outputs.T @ inputs.double())[keep].norm())
