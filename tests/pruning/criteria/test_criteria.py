"""Criteria score as their papers say, in fp32, and leave the weight alone."""

import subprocess
import sys

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from recon.calibration.collection import collect
from recon.calibration.statistics import InputStatistics
from recon.models.matrices import Matrix
from recon.pruning.criteria import Criterion, Magnitude, Random, Wanda
from recon.pruning.patterns import NM, Unstructured
from tests.support import references

CRITERIA = [Magnitude(), Random(), Wanda()]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)


@pytest.fixture
def statistics(inputs: torch.Tensor) -> InputStatistics:
    return InputStatistics(num_tokens=30, gram=references.gram(inputs).float())


def test_magnitude_is_the_absolute_value(weight: torch.Tensor) -> None:
    scores = Magnitude().scores(weight, None, "m")
    assert all(scores[i, j] == abs(weight[i, j].item()) for i in range(6) for j in range(8))


def test_wanda_weighs_by_the_norm_of_the_input(
    weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics
) -> None:
    scores = Wanda().scores(weight, statistics, "m")
    for i in range(6):
        for j in range(8):
            norm = sum(x[j].item() ** 2 for x in inputs.reshape(-1, 8)) ** 0.5
            assert scores[i, j].item() == pytest.approx(abs(weight[i, j].item()) * norm, rel=1e-5)


def test_wanda_says_what_it_lacks(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="wanda needs the norms of the inputs of `q_proj`, got none"):
        Wanda().scores(weight, None, "q_proj")


def test_random_depends_on_seed_and_name_only(weight: torch.Tensor) -> None:
    scores = Random(seed=1).scores(weight, None, "a")
    Random(seed=1).scores(weight, None, "b")
    torch.rand(3)
    assert torch.equal(scores, Random(seed=1).scores(-weight, None, "a"))
    assert not torch.equal(scores, Random(seed=1).scores(weight, None, "b"))
    assert not torch.equal(scores, Random(seed=2).scores(weight, None, "a"))
    assert scores.min() >= 0
    assert scores.max() < 1


def test_random_leaves_the_global_generator_alone(weight: torch.Tensor) -> None:
    before = torch.get_rng_state()
    Random().scores(weight, None, "a")
    assert torch.equal(before, torch.get_rng_state())


def test_random_is_the_same_in_another_process(weight: torch.Tensor) -> None:
    code = (
        "import torch; from recon.pruning.criteria import Random\n"
        "print(Random(3).scores(torch.ones(1, 2), None, 'x').tolist())"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str(Random(3).scores(torch.ones(1, 2), None, "x").tolist())


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_fp32_whatever_the_weight(
    criterion: Criterion, dtype: torch.dtype, weight: torch.Tensor, statistics: InputStatistics
) -> None:
    weight = weight.to(dtype)
    scores = criterion.scores(weight, statistics, "m")
    assert scores.dtype == torch.float32
    assert torch.equal(scores, criterion.scores(weight.float(), statistics, "m"))


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.3, "matrix"), NM()], ids=str)
def test_prune_keeps_the_best_and_moves_nothing(
    criterion: Criterion, pattern: Unstructured | NM, weight: torch.Tensor, statistics: InputStatistics
) -> None:
    before = weight.clone()
    after, keep = criterion.prune(weight, statistics, pattern, "m")
    assert torch.equal(keep, pattern.select(criterion.scores(weight, statistics, "m")))
    assert after is weight
    assert torch.equal(weight, before)
    assert not criterion.moves_weights


def test_prune_names_a_matrix_with_nan(weight: torch.Tensor, statistics: InputStatistics) -> None:
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="for `q_proj`"):
        Wanda().prune(weight, statistics, Unstructured(), "q_proj")


def test_conv1d_is_pruned_as_the_linear_map_it_is(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    conv, linear = Conv1D(6, 8), torch.nn.Linear(8, 6)
    masks = []
    for module in (conv, linear):
        matrix = Matrix.of_module("m", module)
        matrix.weight.copy_(weight)
        with torch.no_grad(), collect({"m": matrix}, "norms") as statistics:
            module(inputs)
        masks.append(matrix.out_in(Wanda().prune(matrix.weight, statistics["m"], NM(), "m")[1]))
    assert conv.weight.shape == (8, 6)
    assert masks[0].shape == conv.weight.shape
    assert torch.equal(masks[0].T, masks[1])


def test_names_and_needs() -> None:
    assert [str(c) for c in CRITERIA] == ["magnitude", "random", "wanda"]
    assert [c.needs for c in CRITERIA] == ["none", "none", "norms"]
