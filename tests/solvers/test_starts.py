"""A start: how far its objective is from the least, by how few products, and what TF32 may not spoil."""

import pytest
import torch
from torch import Tensor

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import Unstructured
from recon.scopes.exact import START_SOLVER
from recon.solvers import ConjugateGradients, LeastSquares, Solution
from tests.support.reconstruction_fixtures import golden_layer
from tests.support.tf32 import TF32


def objective(weight: Tensor, problem: LeastSquares) -> Tensor:
    """Of each row, in fp64."""
    E = (problem.dense - weight).double()
    return (E @ problem.gram.double() * E).sum(1)


def solved(solver: ConjugateGradients, problem: LeastSquares, keep: Tensor) -> tuple[Solution, dict[str, float]]:
    """The solution, and the products of all rows that it took, by precision."""
    with TF32() as mode:
        solution = solver.solve(problem, keep)
    return solution, {name: one / problem.dense.numel() / len(problem.gram) for name, one in mode.products.items()}


def layer(name: str) -> tuple[LeastSquares, Tensor]:
    dense, X, _ = golden_layer(name)
    gram = X.T @ X
    _, keep = Wanda().prune(dense, InputStatistics(len(X), gram=gram), Unstructured(0.6), name)
    return LeastSquares(gram, dense), keep


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_objective_is_within_one_percent_of_the_least(name: str) -> None:
    problem, keep = layer(name)
    exact, _ = solved(ConjugateGradients(), problem, keep)
    start, products = solved(START_SOLVER, problem, keep)
    least = objective(exact.weight, problem).sum()
    assert objective(start.weight, problem).sum() < 1.01 * least
    assert start.relative_error == pytest.approx(exact.relative_error, rel=0.01)
    assert products["ieee"] <= 3  # first and last residual, and W0 G
    assert products["tf32"] <= 6
    # The residual alone does not tell: as loose a tolerance on it leaves several times as much.
    loose, _ = solved(ConjugateGradients(tolerance=1e-2), problem, keep)
    assert objective(loose.weight, problem).sum() > 1.02 * least


@pytest.mark.parametrize("name", ["a", "b"])
def test_tf32_changes_the_objective_by_less_than_the_improvement(name: str) -> None:
    problem, keep = layer(name)
    full, _ = solved(ConjugateGradients(improvement=1e-2), problem, keep)
    start, _ = solved(START_SOLVER, problem, keep)
    assert not torch.equal(full.weight, start.weight)
    assert start.relative_error == pytest.approx(full.relative_error, rel=1e-3)


def test_the_matrix_scope_solves_in_full_fp32() -> None:
    problem, keep = layer("a")
    plain = ConjugateGradients().solve(problem, keep)
    exact, products = solved(ConjugateGradients(), problem, keep)
    assert torch.equal(exact.weight, plain.weight)
    assert products["tf32"] == 0
    assert exact.projected_gradient < 1e-6


def test_no_row_gets_worse_where_tf32_is_lost() -> None:
    """The condition is 2e8: more than TF32 can see, so that its directions may lead uphill."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    X = torch.randn(1024, 256, generator=generator) / torch.arange(1, 257) ** 1.75 @ rotation
    dense = torch.randn(64, 256, generator=generator)
    keep = Unstructured(0.6).select(dense.abs() * X.norm(dim=0))
    problem = LeastSquares(X.T @ X, dense)
    start, _ = solved(START_SOLVER, problem, keep)
    before, after = objective(dense * keep, problem), objective(start.weight, problem)
    assert (after <= before).all()
    assert after.sum() < 0.1 * before.sum()


def test_rows_leave_at_their_own_improvement() -> None:
    problem, keep = layer("a")
    together = START_SOLVER.solve(problem, keep)
    for row in (0, 17, 40):
        one = LeastSquares(problem.gram, problem.dense[row : row + 1])
        alone = START_SOLVER.solve(one, keep[row : row + 1])
        torch.testing.assert_close(together.weight[row], alone.weight[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("improvement", [1.0, -0.1])
def test_nonsense_is_refused(improvement: float) -> None:
    with pytest.raises(ValueError, match=r"0 <= improvement < 1, got .*; 0 iterates to the tolerance"):
        ConjugateGradients(improvement=improvement)
