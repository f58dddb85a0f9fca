"""RIA scores as its paper says: shares of row and column, times a power of the norm of the input."""

import pytest
import torch

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria.ria import RIA
from recon.pruning.patterns import NM, Unstructured
from tests.support import references


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)


@pytest.fixture
def statistics(inputs: torch.Tensor) -> InputStatistics:
    return InputStatistics(num_tokens=30, sum_squares=inputs.square().sum((0, 1)))


def ria(weight: torch.Tensor, inputs: torch.Tensor, exponent: float) -> torch.Tensor:
    """One weight at a time."""
    W, X = weight.double().tolist(), inputs.double().reshape(-1, weight.shape[1]).tolist()
    scores = []
    for row in W:
        scores.append([])
        for j, w in enumerate(row):
            of_input = sum(abs(other[j]) for other in W)
            of_output = sum(abs(other) for other in row)
            norm = sum(x[j] ** 2 for x in X) ** 0.5
            scores[-1].append((abs(w) / of_input + abs(w) / of_output) * norm**exponent)
    return torch.tensor(scores)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores(
    exponent: float, dtype: torch.dtype, weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics
) -> None:
    weight = weight.to(dtype)
    scores = RIA(exponent).scores(weight, statistics, "m")
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, ria(weight, inputs, exponent), rtol=1e-5, atol=0)


def test_the_default_is_the_square_root(
    weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics
) -> None:
    torch.testing.assert_close(RIA().scores(weight, statistics, "m"), ria(weight, inputs, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM()], ids=str)
def test_prune_keeps_the_best_and_moves_nothing(
    pattern: Unstructured | NM, weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics
) -> None:
    after, keep = RIA().prune(weight, statistics, pattern, "m")
    scores = ria(weight, inputs, 0.5)
    expected = references.keep_per_group(scores, 2, 4 if isinstance(pattern, NM) else 8)
    if isinstance(pattern, Unstructured):
        expected = references.keep_per_row(scores, 4)
    assert torch.equal(keep, expected)
    assert after is weight
    assert not RIA.moves_weights


def test_gram_matrices_serve_as_well(weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics) -> None:
    gram = InputStatistics(num_tokens=30, gram=references.gram(inputs).float())
    torch.testing.assert_close(RIA().scores(weight, gram, "m"), RIA().scores(weight, statistics, "m"))


def test_only_the_shares_count(weight: torch.Tensor, statistics: InputStatistics) -> None:
    """Another unit of all weights changes nothing; another unit of one output changes its shares of the inputs."""
    scores = RIA().scores(weight, statistics, "m")
    assert torch.equal(RIA().scores(-4 * weight, statistics, "m"), scores)
    weight[0] *= 4
    assert not torch.allclose(RIA().scores(weight, statistics, "m")[0], scores[0])


def test_rows_and_columns_of_zeros_score_zero(weight: torch.Tensor, statistics: InputStatistics) -> None:
    weight[2], weight[:, 3] = 0, 0
    scores = RIA().scores(weight, statistics, "m")
    assert torch.equal(scores == 0, weight == 0)
    assert scores.isfinite().all()


def test_inputs_that_never_occur_score_zero(weight: torch.Tensor, statistics: InputStatistics) -> None:
    assert statistics.sum_squares is not None
    statistics.sum_squares[3] = 0
    assert (RIA().scores(weight, statistics, "m") == 0).nonzero()[:, 1].tolist() == 6 * [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(value: float, weight: torch.Tensor, statistics: InputStatistics) -> None:
    weight[0, 0] = value
    with pytest.raises(ValueError, match="for `q_proj`"):
        RIA().prune(weight, statistics, Unstructured(0.5), "q_proj")


def test_ria_says_what_it_lacks(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="ria needs the norms of the inputs of `q_proj`, got none"):
        RIA().scores(weight, None, "q_proj")


@pytest.mark.parametrize("exponent", [-0.5, float("nan")])
def test_negative_exponents_are_refused(exponent: float) -> None:
    with pytest.raises(ValueError, match="`exponent` needs to be >= 0"):
        RIA(exponent)
