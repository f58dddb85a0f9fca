"""ALPS finds the support of the published code, or a better one, and the optimal weights for it."""

from itertools import pairwise

import pytest
import torch

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria import alps
from recon.pruning.criteria.admm import ADMM
from recon.pruning.criteria.alps import ALPS
from recon.pruning.criteria.wanda import Wanda
from recon.pruning.patterns import NM, Pattern, Unstructured
from recon.solvers import ConjugateGradients, LeastSquares
from tests.support import references
from tests.support.reconstruction_fixtures import (
    PATTERNS,
    assert_contract,
    assert_dead_columns_go_first,
    distance,
    golden_layer,
    random_layer,
    statistics_of,
)

PUBLISHED = {("a", 50): 0.00290, ("a", 70): 0.01572, ("b", 50): 0.00218, ("b", 70): 0.01301}


@pytest.mark.parametrize(("layer", "percent"), PUBLISHED)
def test_at_least_as_good_as_published(layer: str, percent: int) -> None:
    weight, X, published = golden_layer(layer)
    error = references.relative_error(published[f"alps.layer{percent}"], weight, X)
    assert error == pytest.approx(PUBLISHED[layer, percent], abs=6e-6)
    moved, _ = ALPS().prune(weight, statistics_of(X), Unstructured(percent / 100, "matrix"), layer)
    assert references.relative_error(moved, weight, X) < 0.99 * error  # 0.837 to 0.982


@pytest.mark.parametrize(("layer", "percent"), PUBLISHED)
def test_the_support_is_the_published_one_with_its_ridge(layer: str, percent: int) -> None:
    """The published code adds the ridge to G before it normalises, which favours inputs with large norms."""
    weight, X, published = golden_layer(layer)
    gram = X.T @ X
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    _, keep = ALPS(damping=0.0).prune(
        weight, InputStatistics(len(X), gram=gram), Unstructured(percent / 100, "matrix"), layer
    )
    assert torch.equal(keep, published[f"alps.layer{percent}"] != 0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7, "matrix"), NM()], ids=str)
@pytest.mark.parametrize("layer", ["a", "b"])
def test_weights_are_optimal_and_the_support_better_than_that_of_others(layer: str, pattern: Pattern) -> None:
    weight, X, _ = golden_layer(layer)
    moved, keep = ALPS().prune(weight, statistics_of(X), pattern, layer)
    assert references.projected_gradient(moved, weight, X, keep) < 2e-6
    error = references.relative_error(moved, weight, X)
    for other, factor in ((ADMM(), 0.98), (Wanda(), 0.9)):
        _, kept = other.prune(weight, statistics_of(X), pattern, layer)
        assert error < factor * ConjugateGradients().solve(LeastSquares(X.T @ X, weight), kept).relative_error


def test_a_first_penalty_that_is_too_large_is_cut() -> None:
    """With rho = 1e4 the first iterations cannot leave the support of Wanda, whose least squares have .00414."""
    weight, X, _ = golden_layer("a")
    errors = [
        references.relative_error(ALPS(rho=rho).prune(weight, statistics_of(X), Unstructured(0.5), "m")[0], weight, X)
        for rho in (1e-3, 0.1, 10.0, 1e4)
    ]
    assert errors == pytest.approx([0.00271, 0.00272, 0.00286, 0.00309], rel=0.01)


def test_with_nothing_to_prune_it_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    penalties: list[float] = []
    inverse = alps._inverse
    monkeypatch.setattr(alps, "_inverse", lambda L, Q, rho: (penalties.append(rho), inverse(L, Q, rho))[1])
    weight, inputs = random_layer()
    moved, keep = ALPS().prune(weight, statistics_of(inputs), Unstructured(0.0), "m")
    assert keep.all()
    assert distance(moved, weight) < 1e-5
    assert penalties == pytest.approx([0.1 / 5**i for i in range(8)])


def test_the_penalty_rises_until_the_support_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    penalties: list[float] = []
    inverse = alps._inverse
    monkeypatch.setattr(alps, "_inverse", lambda L, Q, rho: (penalties.append(rho), inverse(L, Q, rho))[1])
    weight, X, _ = golden_layer("a")
    ALPS().prune(weight, statistics_of(X), Unstructured(0.5, "matrix"), "m")
    raises = [round(later / earlier, 3) for earlier, later in pairwise(penalties)]
    assert len(raises) == 9  # 30 iterations: the tenth look finds nothing changed
    assert raises == sorted(raises, reverse=True)
    assert set(raises) == {1.3, 1.2, 1.1}


@pytest.mark.parametrize("max_iterations", [1, 2, 3, 4])
def test_the_limit_of_iterations_ends_with_a_valid_mask(max_iterations: int) -> None:
    weight, inputs = random_layer()
    moved, keep = ALPS(max_iterations=max_iterations).prune(weight, statistics_of(inputs), NM(), "m")
    assert (keep.view(-1, 4).sum(1) == 2).all()
    assert torch.equal(moved != 0, keep)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_contract(pattern: Pattern) -> None:
    assert_contract(ALPS(), pattern)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "matrix"), NM()], ids=str)
def test_dead_columns(pattern: Pattern) -> None:
    assert_dead_columns_go_first(ALPS(), pattern)


def test_more_inputs_than_tokens() -> None:
    """G is singular, and a 2:4 mask can reproduce the outputs of 10 tokens by 20 weights exactly."""
    weight, inputs = random_layer(in_=40)
    inputs = inputs[:1, :10]
    moved, _ = ALPS().prune(weight, statistics_of(inputs), NM(), "m")
    assert references.relative_error(moved, weight, inputs) < 1e-5


def test_units_of_the_inputs_do_not_matter() -> None:
    weight, inputs = random_layer()
    c = torch.logspace(-4, 4, 24)
    plain, keep = ALPS().prune(weight, statistics_of(inputs), Unstructured(0.5), "m")
    scaled, kept_scaled = ALPS().prune(weight / c, statistics_of(inputs * c), Unstructured(0.5), "m")
    assert torch.equal(keep, kept_scaled)
    torch.testing.assert_close(scaled * c, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_fp32(dtype: torch.dtype) -> None:
    weight, inputs = random_layer()
    weight, statistics = weight.to(dtype), statistics_of(inputs)
    expected, _ = ALPS().prune(weight.float(), statistics, NM(), "m")
    with torch.autocast("cpu", torch.bfloat16):
        moved, _ = ALPS().prune(weight, statistics, NM(), "m")
    assert torch.equal(moved, expected)
    assert torch.equal(ALPS().scores(weight, statistics, "m"), Wanda().scores(weight, statistics, "m"))


def test_what_cannot_be_pruned_is_refused_by_name() -> None:
    weight, inputs = random_layer()
    statistics = statistics_of(inputs)
    with pytest.raises(ValueError, match="per row, matrix or group, got 50% per model for `q_proj`"):
        ALPS().prune(weight, statistics, Unstructured(0.5, "model"), "q_proj")
    with pytest.raises(ValueError, match="alps needs the Gram matrix of the inputs of `q_proj`, got none"):
        ALPS().prune(weight, None, Unstructured(0.5), "q_proj")
    with pytest.raises(ValueError, match="divisible by 5, got 24 for `q_proj`"):
        ALPS().prune(weight, statistics, NM(2, 5), "q_proj")
    bad = weight.clone()
    bad[0, 0] = float("inf")
    with pytest.raises(ValueError, match="1 NaN or infinite of 240 for `q_proj`"):
        ALPS().prune(bad, statistics, Unstructured(0.5), "q_proj")
    assert statistics.gram is not None
    statistics.gram[2, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf in the Gram matrix of `q_proj`"):
        ALPS().prune(weight, statistics, Unstructured(0.5), "q_proj")


@pytest.mark.parametrize("options", [{"max_iterations": 0}, {"rho": 0.0}, {"damping": -0.1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="ALPS needs max_iterations >= 1, rho > 0 and damping >= 0"):
        ALPS(**options)  # pyright: ignore[reportArgumentType]
