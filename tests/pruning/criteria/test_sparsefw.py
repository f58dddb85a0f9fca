"""SparseFW minimises the relaxed objective, rounds to an exact mask and is never worse than its start."""

import logging
from itertools import combinations, pairwise

import pytest
import torch

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria.ria import RIA
from recon.pruning.criteria.sparsefw import Relaxed, SparseFW, gradient, relax, vertex
from recon.pruning.criteria.wanda import Wanda
from recon.pruning.patterns import NM, Pattern, Unstructured
from tests.support import references
from tests.support.reconstruction_fixtures import (
    PATTERNS,
    assert_contract,
    assert_counts,
    assert_dead_columns_go_first,
    golden_layer,
    random_layer,
    statistics_of,
)

GROUPS = [(Unstructured(0.5), 24), (Unstructured(0.7, "matrix"), 240), (NM(), 4)]
"""Patterns, and how many weights of `random_layer` share a budget."""


def relaxed(
    pattern: Pattern, num_competing: int, iterations: int, fixed: float = 0.0, line_search: bool = True
) -> tuple[Relaxed, torch.Tensor, torch.Tensor]:
    """What `relax` finds for `random_layer`, the weight and the inputs."""
    weight, inputs = random_layer()
    gram = references.gram(inputs).float()
    saliency = weight.abs() * gram.diagonal().sqrt()
    keep = pattern.select(saliency)
    return relax(weight, gram, saliency, keep, num_competing, iterations, fixed, line_search), weight, inputs


def objective(weight: torch.Tensor, mask: torch.Tensor, inputs: torch.Tensor) -> float:
    """||X W^T - X (M * W)^T||^2 from the outputs themselves, fp64."""
    X = inputs.double().reshape(-1, inputs.shape[-1])
    return float((X @ (weight.double() * (1 - mask.double())).T).square().sum())


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.7), Unstructured(0.5, "matrix"), NM(), NM(4, 8)], ids=str
)
@pytest.mark.parametrize("layer", ["a", "b"])
def test_better_than_wanda(layer: str, pattern: Pattern) -> None:
    weight, X, _ = golden_layer(layer)
    _, keep = SparseFW().prune(weight, statistics_of(X), pattern, layer)
    assert_counts(keep, pattern)
    of_wanda = pattern.select(Wanda().scores(weight, statistics_of(X), layer))
    assert objective(weight, keep, X) < 0.9 * objective(weight, of_wanda, X)


@pytest.mark.parametrize("layer", ["a", "b"])
def test_a_quarter_of_the_papers_iterations_is_enough(layer: str) -> None:
    weight, X, _ = golden_layer(layer)
    for pattern in (Unstructured(0.5), NM()):
        short, long = (
            objective(weight, SparseFW(iterations=n).prune(weight, statistics_of(X), pattern, layer)[1], X)
            for n in (500, 2000)
        )
        assert short == pytest.approx(long, rel=0.0015)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("start", ["wanda", "ria"])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_never_worse_than_its_start(iterations: int, start: str, pattern: Pattern) -> None:
    """Few iterations without line search end far above the start, so the fallback decides."""
    weight, inputs = random_layer()
    statistics = statistics_of(inputs)
    sparsefw = SparseFW(iterations=iterations, fixed=0.0, start="ria" if start == "ria" else "wanda")
    _, keep = sparsefw.prune(weight, statistics, pattern, "m")
    first = pattern.select((RIA() if start == "ria" else Wanda()).scores(weight, statistics, "m"))
    assert_counts(keep, pattern)
    whole = isinstance(pattern, Unstructured) and pattern.per == "matrix"
    for rows in [slice(None)] if whole else [slice(i, i + 1) for i in range(len(weight))]:
        after, before = (objective(weight[rows], mask[rows], inputs) for mask in (keep, first))
        assert after <= before * (1 + 1e-5)
    if iterations == 0:
        assert torch.equal(keep, first)


def test_the_better_of_start_and_end_is_taken_row_by_row() -> None:
    """8 iterations without line search make 3 of 10 rows better and the matrix 27 % worse."""
    found, weight, inputs = relaxed(Unstructured(0.5), 24, iterations=8, line_search=False)
    first, _, _ = relaxed(Unstructured(0.5), 24, iterations=0)
    _, keep = SparseFW(iterations=8, fixed=0.0).prune(weight, statistics_of(inputs), Unstructured(0.5), "m")
    after, before = (
        [objective(w[None], mask[None], inputs) for w, mask in zip(weight, one.keep, strict=True)]
        for one in (found, first)
    )
    assert sum(a < b for a, b in zip(after, before, strict=True)) == 3
    assert sum(after) > 1.2 * sum(before)
    for i in range(10):
        assert torch.equal(keep[i], (found if after[i] < before[i] else first).keep[i])


def test_the_gradient_is_that_of_autograd() -> None:
    weight, inputs = random_layer()
    X = inputs.flatten(0, 1)
    G = references.gram(inputs).float()
    M = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (X @ weight.T - X @ (M * weight).T).square().sum().backward()
    by_formula = -2 * weight * (weight @ G - (weight * M.detach()) @ G)
    assert M.grad is not None
    torch.testing.assert_close(by_formula, M.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(gradient(weight, (weight * (1 - M.detach())) @ G), M.grad, rtol=1e-4, atol=1e-2)


def slow_vertex(gradient: list[float], fixed: list[bool], budget: int) -> list[float]:
    free = sorted((g, i) for i, g in enumerate(gradient) if not fixed[i] and g < 0)
    chosen = {i for _, i in free[:budget]}
    return [float(fixed[i] or i in chosen) for i in range(len(gradient))]


@pytest.mark.parametrize("num_competing", [4, 24, 240])
def test_the_vertex_minimises_the_linear_objective(num_competing: int) -> None:
    generator = torch.Generator().manual_seed(4)
    slopes = torch.randn(10, 24, generator=generator) + 0.5
    fixed = torch.rand(10, 24, generator=generator) < 0.2
    for budget in (0, 1, num_competing // 2):
        V = vertex(slopes, fixed, num_competing, budget)
        groups = zip(slopes.view(-1, num_competing).tolist(), fixed.view(-1, num_competing).tolist(), strict=True)
        assert V.view(-1, num_competing).tolist() == [slow_vertex(g, f, budget) for g, f in groups]


@pytest.mark.parametrize(("pattern", "num_competing"), GROUPS, ids=str)
def test_iterations_are_those_of_the_paper(pattern: Pattern, num_competing: int) -> None:
    """The formulas in fp64, with a fresh (W * M) G in every iteration."""
    iterations, a = 30, 0.6
    found, W, inputs = relaxed(pattern, num_competing, iterations, fixed=a, line_search=False)
    G, W = references.gram(inputs), W.double()
    saliency = (W.abs() * G.diagonal().sqrt()).view(-1, num_competing)
    k = int(pattern.select(saliency.view_as(W)).view(-1, num_competing)[0].sum())
    fixed = references.keep_per_row(saliency, int(a * k)).view_as(W)
    M = references.keep_per_row(saliency, k).view_as(W).double()
    objectives = [objective(W, M, inputs)]
    for t in range(iterations):
        slopes = -2 * W * (W @ G - (W * M) @ G)
        groups = zip(slopes.view(-1, num_competing).tolist(), fixed.view(-1, num_competing).tolist(), strict=True)
        V = torch.tensor([slow_vertex(g, f, k - int(a * k)) for g, f in groups], dtype=torch.float64).view_as(W)
        eta = 2 / (t + 2)
        M = (1 - eta) * M + eta * V
        objectives.append(objective(W, M, inputs))
    torch.testing.assert_close(found.mask.double(), M, rtol=1e-5, atol=1e-5)
    assert found.objectives == pytest.approx(objectives, rel=1e-4)


@pytest.mark.parametrize(("pattern", "num_competing"), GROUPS, ids=str)
def test_line_search_never_raises_the_objective(pattern: Pattern, num_competing: int) -> None:
    found, weight, inputs = relaxed(pattern, num_competing, 200)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(found.objectives))
    assert found.objectives[-1] < 0.9 * found.objectives[0]
    assert found.objectives[-1] == pytest.approx(objective(weight, found.mask, inputs), rel=1e-4)
    agnostic, _, _ = relaxed(pattern, num_competing, 200, line_search=False)
    assert any(later > earlier * (1 + 1e-6) for earlier, later in pairwise(agnostic.objectives))
    assert found.objectives[-1] == pytest.approx(agnostic.objectives[-1], rel=0.02)


def test_a_step_ends_at_the_vertex() -> None:
    """Four copies of an input in different units: beyond the vertex the objective would fall further."""
    W, a = torch.ones(1, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    keep = torch.tensor([[True, True, False, False]])
    found = relax(W, torch.outer(a, a), W, keep, 4, 1, 0.0, True)
    assert found.mask.tolist() == [[0, 0, 1, 1]]
    assert found.objectives == [49, 9]


def test_each_row_has_its_own_step() -> None:
    """So a row ends where it ends alone, up to rounding."""
    together, weight, inputs = relaxed(Unstructured(0.5), 24, 20)
    gram = references.gram(inputs).float()
    saliency = weight.abs() * gram.diagonal().sqrt()
    keep = Unstructured(0.5).select(saliency)
    for i in range(len(weight)):
        row = slice(i, i + 1)
        alone = relax(weight[row], gram, saliency[row], keep[row], 24, 20, 0.0, True)
        torch.testing.assert_close(together.mask[row], alone.mask, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("pattern", "num_competing"), GROUPS, ids=str)
@pytest.mark.parametrize("fixed", [0.0, 0.6, 1.0])
def test_the_mask_stays_in_the_polytope(fixed: float, pattern: Pattern, num_competing: int) -> None:
    found, weight, inputs = relaxed(pattern, num_competing, 50, fixed)
    k = int(found.keep.view(-1, num_competing)[0].sum())
    assert found.mask.min() >= 0
    assert found.mask.max() <= 1 + 1e-6
    assert (found.mask.view(-1, num_competing).sum(1) <= k * (1 + 1e-5)).all()
    saliency = (weight.abs() * references.gram(inputs).diagonal().sqrt()).view(-1, num_competing)
    highest = references.keep_per_row(saliency, int(fixed * k)).view_as(weight)
    assert found.keep[highest].all()
    torch.testing.assert_close(found.mask[highest], torch.ones(int(highest.sum())))
    assert_counts(found.keep, pattern)


def test_the_relaxation_bounds_the_best_mask_from_below() -> None:
    """All 70 masks of 4 in 8 weights, for each of 6 rows."""
    weight, inputs = random_layer(out=6, in_=8, seed=3)
    gram = references.gram(inputs).float()
    saliency = weight.abs() * gram.diagonal().sqrt()
    for i in range(len(weight)):
        w, s = weight[i : i + 1], saliency[i : i + 1]
        masks = [torch.tensor([[float(j in kept) for j in range(8)]]) for kept in combinations(range(8), 4)]
        best = min(objective(w, mask, inputs) for mask in masks)
        found = relax(w, gram, s, Unstructured(0.5).select(s), 8, 2000, 0.0, True)
        assert found.objectives[-1] <= best * (1 + 1e-5)
        # A stationary point: no vertex is downhill, so the gap to the optimum of the relaxation is small.
        slopes = gradient(w, (w * (1 - found.mask)) @ gram)
        gap = float((slopes * (found.mask - vertex(slopes, torch.zeros_like(found.keep), 8, 4))).sum())
        assert gap < 0.02 * best


def test_what_the_relaxation_leaves_equal_is_ranked_by_saliency() -> None:
    """Dead inputs have no gradient, so their M is 0 after a step of 1; the budget is for 12 and 4 inputs live."""
    weight, _ = random_layer()
    gram = torch.diag(torch.arange(24) < 4).float()
    saliency = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5))
    none_live = Unstructured(0.5).select(saliency - gram.diagonal())
    found = relax(weight, gram, saliency, none_live, 24, 1, 0.0, False)
    assert (found.mask == gram.diagonal()).all()
    assert torch.equal(found.keep, references.keep_per_row(saliency + gram.diagonal(), 12))


def test_the_objective_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    weight, X, _ = golden_layer("a")
    with caplog.at_level(logging.INFO, "recon.pruning.criteria.sparsefw"):
        _, keep = SparseFW(iterations=50).prune(weight, statistics_of(X), Unstructured(0.5), "q_proj")
    first = Unstructured(0.5).select(Wanda().scores(weight, statistics_of(X), "m"))
    start, end = (f"{objective(weight, mask, X):.3g}" for mask in (first, keep))
    [record] = caplog.records
    assert "SparseFW on `q_proj`, 50 iterations" in record.message
    numbers = [f"{float(word):.3g}" for word in record.message.replace(",", "").split() if word[0].isdigit()]
    assert numbers[1] == start
    assert numbers[-1] == end


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("line_search", [False, True])
def test_contract(line_search: bool, pattern: Pattern) -> None:
    assert_contract(SparseFW(iterations=40, line_search=line_search), pattern)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "matrix"), NM()], ids=str)
def test_dead_columns(pattern: Pattern) -> None:
    assert_dead_columns_go_first(SparseFW(iterations=40), pattern)


def test_weights_of_any_type_are_returned_as_received() -> None:
    weight, inputs = random_layer()
    weight = weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        after, keep = SparseFW().prune(weight, statistics_of(inputs.clone()), NM(), "m")
    assert after is weight
    _, expected = SparseFW().prune(weight.float(), statistics_of(inputs), NM(), "m")
    assert torch.equal(keep, expected)


def test_what_cannot_be_pruned_is_refused_by_name() -> None:
    weight, inputs = random_layer()
    statistics = statistics_of(inputs)
    with pytest.raises(ValueError, match="per row, matrix or group, got 50% per model for `q_proj`"):
        SparseFW().prune(weight, statistics, Unstructured(0.5, "model"), "q_proj")
    with pytest.raises(ValueError, match="sparsefw needs the Gram matrix of the inputs of `q_proj`, got none"):
        SparseFW().prune(weight, InputStatistics(1, sum_squares=torch.ones(24)), Unstructured(0.5), "q_proj")
    with pytest.raises(ValueError, match="divisible by 5, got 24 for `q_proj`"):
        SparseFW().prune(weight, statistics, NM(2, 5), "q_proj")
    bad = weight.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 NaN or infinite of 240 for `q_proj`"):
        SparseFW().prune(bad, statistics, Unstructured(0.5), "q_proj")
    with pytest.raises(FloatingPointError, match="NaN or Inf in the objective of `q_proj`"):
        SparseFW().prune(weight * 1e20, statistics, Unstructured(0.5), "q_proj")
    assert statistics.gram is not None
    statistics.gram[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf in the Gram matrix of `q_proj`"):
        SparseFW().prune(weight, statistics, Unstructured(0.5), "q_proj")


@pytest.mark.parametrize("options", [{"iterations": -1}, {"fixed": 1.5}, {"fixed": -0.1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="SparseFW needs iterations >= 0 and 0 <= fixed <= 1"):
        SparseFW(**options)  # pyright: ignore[reportArgumentType]


def test_names_and_needs() -> None:
    assert (str(SparseFW()), SparseFW.needs, SparseFW.moves_weights) == ("sparsefw", "gram", False)
    weight, inputs = random_layer()
    statistics = statistics_of(inputs)
    assert torch.equal(SparseFW().scores(weight, statistics, "m"), Wanda().scores(weight, statistics, "m"))
    assert torch.equal(SparseFW(start="ria").scores(weight, statistics, "m"), RIA().scores(weight, statistics, "m"))
