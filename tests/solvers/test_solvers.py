"""The solver finds the optimum of masked least squares: its gradient on the mask is zero."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import NM, Unstructured
from recon.solvers import ConjugateGradients, LeastSquares, Solution
from tests.support import references

GOLDEN = Path(__file__).parents[1] / "golden"

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs X, their Gram matrix, the dense weight, the mask."""


def solve(
    gram: torch.Tensor,
    dense: torch.Tensor,
    keep: torch.Tensor,
    start: torch.Tensor | None = None,
    name: str = "the matrix",
    **options: Any,
) -> Solution:
    return ConjugateGradients(**options).solve(LeastSquares(gram, dense), keep, start, name)


def problem(out: int = 12, in_: int = 20, num_tokens: int = 100, sparsity: float = 0.5, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_, in_, generator=generator)
    X = torch.randn(num_tokens, in_, generator=generator) @ mixing
    dense = torch.randn(out, in_, generator=generator)
    gram = references.gram(X).float()
    keep = Unstructured(sparsity).select(dense.abs() * gram.diagonal().sqrt())
    return X, gram, dense, keep


def golden(layer: str) -> tuple[Problem, torch.Tensor]:
    tensors = load_file(GOLDEN / f"layer_{layer}.safetensors")
    X, dense = tensors["inputs"].flatten(0, 1), tensors["weight"]
    gram = X.T @ X
    _, keep = Wanda().prune(dense, InputStatistics(len(X), gram=gram), Unstructured(0.5), layer)
    return (X, gram, dense, keep), tensors["admm.fixedmask.rowwise50"]


@pytest.mark.parametrize(("layer", "wanda", "admm"), [("a", ".00769", ".00423"), ("b", ".00706", ".00332")])
def test_published_layers(layer: str, wanda: str, admm: str) -> None:
    (X, gram, dense, keep), of_admm = golden(layer)
    assert torch.equal(of_admm != 0, keep)  # the mask is that of the published Wanda
    error_of_wanda = references.relative_error(dense * keep, dense, X)
    error_of_admm = references.relative_error(of_admm, dense, X)
    assert f"{error_of_wanda:.5f}" == "0" + wanda
    assert f"{error_of_admm:.5f}" == "0" + admm

    solution = solve(gram, dense, keep)
    assert references.projected_gradient(solution.weight, dense, X, keep) < 2e-6
    assert solution.projected_gradient < 1e-6
    assert solution.iterations < 60
    assert references.relative_error(solution.weight, dense, X) < error_of_admm
    exact = references.masked_least_squares(dense, X, keep)
    assert solution.relative_error == pytest.approx(references.relative_error(exact, dense, X), rel=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_the_solution_is_that_of_dense_least_squares(sparsity: float) -> None:
    X, gram, dense, keep = problem(sparsity=sparsity)
    solution = solve(gram, dense, keep)
    exact = references.masked_least_squares(dense, X, keep)
    torch.testing.assert_close(solution.weight.double(), exact, rtol=2e-4, atol=2e-4)
    assert (solution.weight[~keep] == 0).all()
    # With nothing pruned both errors are zero up to rounding.
    assert solution.relative_error == pytest.approx(references.relative_error(exact, dense, X), rel=1e-5, abs=1e-12)


def test_what_is_reported_is_what_is_returned() -> None:
    X, gram, dense, keep = problem()
    for max_iterations in (0, 1, 3):
        solution = solve(gram, dense, keep, max_iterations=max_iterations)
        assert solution.iterations == max_iterations
        gradient = references.projected_gradient(solution.weight, dense, X, keep)
        assert solution.projected_gradient == pytest.approx(gradient, rel=1e-4)
        assert solution.relative_error == pytest.approx(references.relative_error(solution.weight, dense, X), rel=1e-5)
    assert torch.equal(solve(gram, dense, keep, max_iterations=0).weight, dense * keep)


def test_more_iterations_are_never_worse() -> None:
    _, gram, dense, keep = problem()
    errors = [solve(gram, dense, keep, max_iterations=n).relative_error for n in range(12)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("begin_at", ["random", "optimum"])
def test_no_row_is_worse_than_its_start(begin_at: str, seed: int) -> None:
    """Also if the start is the optimum, where rounding alone decides: strictly, in the solver's fp32."""
    X, gram, dense, keep = problem(seed=seed)
    start = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed)) * keep
    if begin_at == "optimum":
        start = references.masked_least_squares(dense, X, keep).float()
    solution = solve(gram, dense, keep, start=start, tolerance=1e-12)
    before, after = (((W - dense) @ gram * (W - dense)).sum(1) for W in (start, solution.weight))
    assert (after <= before).all()


def test_every_start_leads_to_the_same_optimum() -> None:
    _, gram, dense, keep = problem()
    far = 100 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(3))
    near = solve(gram, dense, keep)
    restarted = solve(gram, dense, keep, start=near.weight)
    assert restarted.iterations == 0
    assert torch.equal(restarted.weight, near.weight)
    torch.testing.assert_close(solve(gram, dense, keep, start=far).weight, near.weight, rtol=1e-3, atol=1e-3)


def test_a_far_start_is_recovered_from() -> None:
    """Its rounding errors stay in the updated residual; only the true one shows them."""
    X, gram, dense, keep = problem()
    far = 1e4 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(3))
    solution = solve(gram, dense, keep, start=far)
    assert references.projected_gradient(solution.weight, dense, X, keep) < 2e-6


def test_rows_do_not_influence_each_other() -> None:
    _, gram, dense, keep = problem()
    dense = dense * torch.logspace(-3, 3, len(dense))[:, None]
    together = solve(gram, dense, keep).weight
    for row in range(len(dense)):
        alone = solve(gram, dense[row : row + 1], keep[row : row + 1]).weight[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-4 * float(dense[row].norm()))


def test_units_of_the_inputs_do_not_matter() -> None:
    """Jacobi preconditioning: scaling an input by c and its weights by 1 / c is the same problem."""
    _, gram, dense, keep = problem()
    c = torch.logspace(-3, 3, dense.shape[1])
    plain = solve(gram, dense, keep)
    scaled = solve(gram * c * c[:, None], dense / c, keep)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-4)


def test_n_m_masks() -> None:
    X, gram, dense, _ = problem()
    keep = NM().select(dense.abs())
    solution = solve(gram, dense, keep)
    assert references.projected_gradient(solution.weight, dense, X, keep) < 1e-5
    assert (solution.weight[~keep] == 0).all()


def test_inputs_that_never_occurred_keep_the_start() -> None:
    X, _, dense, keep = problem()
    X = X.clone()
    X[:, [2, 5]] = 0
    keep[:, 2] = True
    start = torch.full_like(dense, 7.0)
    solution = solve(references.gram(X).float(), dense, keep, start=start)
    assert torch.equal(solution.weight[:, [2, 5]], (start * keep)[:, [2, 5]])
    assert solution.projected_gradient < 1e-6
    default = solve(references.gram(X).float(), dense, keep)
    assert torch.equal(default.weight[:, 2], dense[:, 2])


def test_more_inputs_than_tokens() -> None:
    """A singular Gram matrix has many optima; their error is one."""
    X, gram, dense, keep = problem(in_=40, num_tokens=10)
    solution = solve(gram, dense, keep, max_iterations=2000)
    exact = references.masked_least_squares(dense, X, keep)
    assert references.relative_error(exact, dense, X) < 1e-12
    assert solution.relative_error < 1e-7


def test_degenerate_matrices() -> None:
    _, gram, dense, keep = problem()
    nothing_kept = solve(gram, dense, torch.zeros_like(keep))
    assert not nothing_kept.weight.any()
    assert (nothing_kept.relative_error, nothing_kept.projected_gradient) == (1.0, 0.0)
    no_inputs = solve(torch.zeros_like(gram), dense, keep)
    assert torch.equal(no_inputs.weight, dense * keep)
    assert (no_inputs.relative_error, no_inputs.projected_gradient, no_inputs.iterations) == (0.0, 0.0, 0)
    dense[3] = 0
    zero_row = solve(gram, dense, keep)
    assert not zero_row.weight[3].any()


def test_an_unreachable_tolerance_stops_early() -> None:
    _, gram, dense, keep = problem()
    solution = solve(gram, dense, keep, tolerance=1e-12, max_iterations=100_000)
    assert solution.iterations < 2000
    assert solution.projected_gradient < 1e-6


def test_an_ill_conditioned_matrix_is_solved_within_the_default_iterations() -> None:
    """Eigenvalues from 1 to 1 / 65536, a single row, the residual pauses for dozens of iterations."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    X = torch.randn(1024, 256, generator=generator) / torch.arange(1, 257) @ rotation
    dense = torch.randn(1, 256, generator=generator)
    gram = X.T @ X
    keep = Unstructured(0.6).select(dense.abs() * gram.diagonal().sqrt())
    solution = solve(gram, dense, keep)
    assert solution.projected_gradient < 1e-6
    assert solution.iterations < 300  # 204; without preconditioning or conjugacy it takes thousands


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_fp32(dtype: torch.dtype) -> None:
    _, gram, dense, keep = problem()
    dense = dense.to(dtype)
    solution = solve(gram, dense, keep)
    assert solution.weight.dtype == torch.float32
    assert solution.projected_gradient < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(solve(gram, dense, keep).weight, solution.weight)


def test_arguments_are_left_alone_and_results_repeat() -> None:
    _, gram, dense, keep = problem()
    start = torch.randn(dense.shape)
    copies = [tensor.clone() for tensor in (gram, dense, keep, start)]
    first = solve(gram, dense, keep, start)
    second = solve(gram, dense, keep, start)
    assert all(torch.equal(a, b) for a, b in zip(copies, (gram, dense, keep, start), strict=True))
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("argument", ["gram", "dense", "start"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(argument: str, bad: float) -> None:
    _, gram, dense, keep = problem()
    arguments = {"gram": gram, "dense": dense, "start": dense.clone()}
    arguments[argument][1, 1] = bad
    with pytest.raises(ValueError, match=f"NaN or Inf in `{argument}` of `q_proj`"):
        solve(keep=keep, name="q_proj", **arguments)


def test_overflow_is_refused_by_name() -> None:
    _, gram, dense, keep = problem()
    with pytest.raises(ValueError, match="NaN or Inf in `objective` of `q_proj`"):
        solve(gram * 1e34, dense * 1e5, keep, name="q_proj")
