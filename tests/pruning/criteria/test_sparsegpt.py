"""SparseGPT finds what the published code finds, and what a sweep without its shortcuts finds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria import Wanda
from recon.pruning.criteria.sparsegpt import SparseGPT, inverse_factor
from recon.pruning.patterns import NM, Pattern, Unstructured
from tests.support import references

GOLDEN = Path(__file__).parents[2] / "golden"

MATRIX, ROW = Unstructured(0.6, "matrix"), Unstructured(0.6, "row")
PATTERNS = [
    MATRIX,
    ROW,
    Unstructured(0.0),
    Unstructured(0.99, "matrix"),
    NM(),
    NM(1, 4),
    NM(4, 8),
    NM(2, 3),
    NM(24, 24),
]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(10, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 40, 24, generator=generator) @ torch.randn(24, 24, generator=generator)


@pytest.fixture
def statistics(inputs: torch.Tensor) -> InputStatistics:
    return statistics_of(inputs)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    X = inputs.reshape(-1, inputs.shape[-1])
    return InputStatistics(len(X), gram=X.T @ X)


def hessian(inputs: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    H = 2 / inputs.shape[0] * references.gram(inputs)
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def slow_sparsegpt(
    weight: torch.Tensor, inputs: torch.Tensor, pattern: Pattern, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sweep in fp64, column by column, with a fresh inverse of what remains of H, no blocks of updates."""
    W, H = weight.double().clone(), hessian(inputs)
    out, n = W.shape
    keep = torch.ones(out, n, dtype=torch.bool)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(n)]
    width = pattern.of if isinstance(pattern, NM) else block
    for j in range(n):
        if j % width == 0:
            end = min(j + width, n)
            scores = torch.stack([W[:, i] ** 2 / inverses[i][0, 0] for i in range(j, end)], dim=1)
            if isinstance(pattern, NM):
                keep[:, j:end] = references.keep_per_row(scores, pattern.keep)
            elif isinstance(pattern, Unstructured) and pattern.per == "row":
                pruned = round(pattern.sparsity * end) - round(pattern.sparsity * j)
                keep[:, j:end] = references.keep_per_row(scores, end - j - pruned)
            elif isinstance(pattern, Unstructured):
                pruned = round(pattern.sparsity * out * end) - round(pattern.sparsity * out * j)
                keep[:, j:end] = references.keep_per_row(scores.reshape(1, -1), scores.numel() - pruned).view_as(scores)
        inverse = inverses[j]
        for row in range(out):
            if not keep[row, j]:
                W[row, j:] -= W[row, j] / inverse[0, 0] * inverse[0]
                W[row, j] = 0
    return W, keep


@pytest.mark.parametrize("layer", ["a", "b"])
@pytest.mark.parametrize(
    ("key", "pattern"),
    [("unstructured50", Unstructured(0.5, "matrix")), ("unstructured70", Unstructured(0.7, "matrix")), ("2of4", NM())],
)
def test_published_layers(layer: str, key: str, pattern: Pattern) -> None:
    tensors = load_file(GOLDEN / f"layer_{layer}.safetensors")
    dense, published = tensors["weight"], tensors[f"sparsegpt.{key}"]
    criterion = SparseGPT(published_counts=isinstance(pattern, Unstructured))
    weight, keep = criterion.prune(dense, statistics_of(tensors["inputs"]), pattern, layer)
    assert torch.equal(keep, published != 0)
    assert (weight - published).norm() < 1e-5 * published.norm()


# The errors that the published code has, to its five digits, or less: it prunes one weight more per block.
@pytest.mark.parametrize(
    ("layer", "sparsity", "error"), [("a", 0.5, 0.00599), ("a", 0.7, 0.02894), ("b", 0.5, 0.00459), ("b", 0.7, 0.02417)]
)
def test_exact_counts_cost_no_error(layer: str, sparsity: float, error: float) -> None:
    tensors = load_file(GOLDEN / f"layer_{layer}.safetensors")
    dense, X = tensors["weight"], tensors["inputs"]
    weight, keep = SparseGPT().prune(dense, statistics_of(X), Unstructured(sparsity, "matrix"), layer)
    assert int((~keep).sum()) == round(sparsity * dense.numel())
    assert 0.99 * error < references.relative_error(weight, dense, X) < error + 5e-6


def test_moving_weights_pays() -> None:
    tensors = load_file(GOLDEN / "layer_b.safetensors")
    dense, X = tensors["weight"], tensors["inputs"]
    for pattern in (Unstructured(0.5), NM()):
        weight, _ = SparseGPT().prune(dense, statistics_of(X), pattern, "b")
        _, keep = Wanda().prune(dense, statistics_of(X), pattern, "b")
        wanda = references.relative_error(dense * keep, dense, X)
        assert references.relative_error(weight, dense, X) < 0.8 * wanda


@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_sweep_is_that_without_shortcuts(
    block: int, pattern: Pattern, weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics
) -> None:
    moved, keep = SparseGPT(block=block).prune(weight, statistics, pattern, "m")
    expected, expected_keep = slow_sparsegpt(weight, inputs, pattern, block)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 5, 7, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.35, 0.5, 0.97])
def test_counts_are_exact(block: int, sparsity: float, weight: torch.Tensor, statistics: InputStatistics) -> None:
    _, by_row = SparseGPT(block=block).prune(weight, statistics, Unstructured(sparsity, "row"), "m")
    assert (~by_row).sum(1).tolist() == 10 * [round(sparsity * 24)]
    _, by_matrix = SparseGPT(block=block).prune(weight, statistics, Unstructured(sparsity, "matrix"), "m")
    assert int((~by_matrix).sum()) == round(sparsity * 240)


@pytest.mark.parametrize("block", [1, 5, 7, 128])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 3), NM(5, 12)], ids=str)
def test_every_group_has_its_count(block: int, pattern: NM, weight: torch.Tensor, statistics: InputStatistics) -> None:
    moved, keep = SparseGPT(block=block).prune(weight, statistics, pattern, "m")
    assert (keep.reshape(-1, pattern.of).sum(1) == pattern.keep).all()
    assert torch.equal(moved != 0, keep)


def test_published_counts_are_one_more_per_block(weight: torch.Tensor, statistics: InputStatistics) -> None:
    _, keep = SparseGPT(block=8, published_counts=True).prune(weight, statistics, MATRIX, "m")
    assert [int((~part).sum()) for part in keep.split(8, dim=1)] == 3 * [round(0.6 * 80) + 1]
    _, in_groups = SparseGPT(published_counts=True).prune(weight, statistics, NM(), "m")
    assert torch.equal(in_groups, SparseGPT().prune(weight, statistics, NM(), "m")[1])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruned_is_zero_and_what_was_received_is_left_alone(
    pattern: Pattern, weight: torch.Tensor, statistics: InputStatistics
) -> None:
    assert statistics.gram is not None
    before, gram = weight.clone(), statistics.gram.clone()
    moved, keep = SparseGPT(block=8).prune(weight, statistics, pattern, "m")
    assert (moved[~keep] == 0).all()
    assert torch.equal(weight, before)
    assert torch.equal(statistics.gram, gram)
    again, keep_again = SparseGPT(block=8).prune(weight, statistics, pattern, "m")
    assert torch.equal(again, moved)
    assert torch.equal(keep_again, keep)
    if keep.all():
        assert torch.equal(moved, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_type_is_computed_in_fp32(dtype: torch.dtype, weight: torch.Tensor, statistics: InputStatistics) -> None:
    weight = weight.to(dtype)
    moved, keep = SparseGPT(block=8).prune(weight, statistics, ROW, "m")
    expected, expected_keep = SparseGPT(block=8).prune(weight.float(), statistics, ROW, "m")
    assert moved.dtype == torch.float32
    assert torch.equal(moved, expected)
    assert torch.equal(keep, expected_keep)


def test_autocast_and_gradients_change_nothing(weight: torch.Tensor, statistics: InputStatistics) -> None:
    expected, _ = SparseGPT(block=8).prune(weight, statistics, ROW, "m")
    with torch.autocast("cpu", torch.bfloat16):
        moved, _ = SparseGPT(block=8).prune(torch.nn.Parameter(weight), statistics, ROW, "m")
    assert torch.equal(moved, expected)
    assert not moved.requires_grad


@pytest.mark.parametrize("pattern", [MATRIX, ROW, NM()], ids=str)
def test_the_order_of_batches_is_rounding(pattern: Pattern, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        gram = torch.zeros(24, 24)
        for batch in order:
            gram += inputs[batch].T @ inputs[batch]
        results.append(SparseGPT(block=8).prune(weight, InputStatistics(120, gram=gram), pattern, "m"))
    (first, keep), (second, keep_again) = results
    assert torch.equal(keep, keep_again)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_dead", [0, 4])
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**10])
def test_the_unit_of_the_inputs_does_not_matter(
    num_dead: int, scale: float, weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    """Powers of two are exact. With the published 1 on the diagonal of dead inputs it would matter."""
    inputs[..., :num_dead] = 0
    moved, keep = SparseGPT(block=8).prune(weight, statistics_of(inputs), ROW, "m")
    scaled, keep_scaled = SparseGPT(block=8).prune(weight, statistics_of(scale * inputs), ROW, "m")
    assert torch.equal(keep, keep_scaled)
    assert torch.equal(moved, scaled)


@pytest.mark.parametrize("pattern", [Unstructured(0.25, "matrix"), Unstructured(0.25), NM()], ids=str)
def test_dead_inputs_are_pruned_first(pattern: Pattern, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    dead = [1, 9, 18, 19]
    inputs[..., dead] = 0
    moved, keep = SparseGPT(block=8).prune(weight, statistics_of(inputs), pattern, "m")
    assert not keep[:, dead].any()
    assert (moved[:, dead] == 0).all()
    assert int((~keep).sum()) == (120 if isinstance(pattern, NM) else 60)


@pytest.mark.parametrize("pattern", [ROW, MATRIX, NM()], ids=str)
def test_more_dead_inputs_than_zeros_keep_the_count(
    pattern: Pattern, weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    inputs[..., :20] = 0
    statistics, untouched = statistics_of(inputs), statistics_of(inputs)
    moved, keep = SparseGPT(block=8).prune(weight, statistics, pattern, "m")
    assert torch.equal(torch.as_tensor(statistics.gram), torch.as_tensor(untouched.gram))
    assert (moved[:, :20] == 0).all()
    zeros = {ROW: 10 * round(0.6 * 24), MATRIX: round(0.6 * 240), NM(): 120}[pattern]
    assert int((~keep).sum()) == zeros


def test_dead_inputs_change_nothing_for_the_live_ones(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    alive, keep_alive = SparseGPT(block=8).prune(weight[:, 4:], statistics_of(inputs[..., 4:]), NM(), "m")
    inputs[..., :4] = 0
    moved, keep = SparseGPT(block=8).prune(weight, statistics_of(inputs), NM(), "m")
    assert torch.equal(keep[:, 4:], keep_alive)
    torch.testing.assert_close(moved[:, 4:], alive, rtol=1e-4, atol=1e-5)


def test_a_matrix_without_any_input_is_pruned_to_its_count(weight: torch.Tensor) -> None:
    moved, keep = SparseGPT().prune(weight, InputStatistics(5, gram=torch.zeros(24, 24)), ROW, "m")
    assert (moved == 0).all()
    assert (~keep).sum(1).tolist() == 10 * [round(0.6 * 24)]


@pytest.mark.parametrize("pattern", [MATRIX, ROW, NM()], ids=str)
def test_a_singular_gram_is_damped_and_reported(
    pattern: Pattern, weight: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    X = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))  # fewer tokens than inputs
    X[:, 1] = X[:, 0]
    moved, keep = SparseGPT(damping=0.0).prune(weight, statistics_of(X), pattern, "q_proj")
    assert "`q_proj` has no Cholesky factor in fp32 with damping 0; used fp64" in caplog.text
    assert moved.isfinite().all()
    # The factor is of use: an identity in its place would move nothing.
    assert references.relative_error(moved, weight, X) < 0.6 * references.relative_error(weight * keep, weight, X)
    caplog.clear()
    SparseGPT().prune(weight, statistics_of(X), pattern, "q_proj")
    assert not caplog.records


def test_the_inverse_factor_is_that_of_the_inverse(inputs: torch.Tensor) -> None:
    U = inverse_factor(references.gram(inputs).float(), 0.01, "m").double()
    H = hessian(inputs) * inputs.shape[0] / 2
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ H, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)


def test_scores_are_those_before_any_update(
    weight: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics
) -> None:
    scores = SparseGPT().scores(weight.to(torch.bfloat16), statistics, "m")
    H = hessian(inputs) * inputs.shape[0] / 2
    losses = [torch.linalg.inv(H[j:, j:])[0, 0].reciprocal() for j in range(24)]
    expected = weight.to(torch.bfloat16).double().square() * torch.stack(losses)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=0)
    # A block that holds the whole matrix is chosen before any update.
    _, keep = SparseGPT().prune(weight, statistics, ROW, "m")
    assert torch.equal(keep, ROW.select(SparseGPT().scores(weight, statistics, "m")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", [MATRIX, ROW, NM()], ids=str)
def test_non_finite_numbers_are_named(
    value: float, pattern: Pattern, weight: torch.Tensor, statistics: InputStatistics
) -> None:
    assert statistics.gram is not None
    broken = weight.clone()
    broken[3, 23] = value
    with pytest.raises(ValueError, match="for `q_proj`"):
        SparseGPT().prune(broken, statistics, pattern, "q_proj")
    dead = statistics.gram.clone()
    dead[23], dead[:, 23] = 0, 0
    with pytest.raises(ValueError, match="for `q_proj`"):
        SparseGPT().prune(broken, InputStatistics(120, gram=dead), pattern, "q_proj")
    statistics.gram[3, 23] = value
    with pytest.raises(FloatingPointError, match="`q_proj`"):
        SparseGPT().prune(weight, statistics, pattern, "q_proj")


@pytest.mark.parametrize("pattern", [MATRIX, ROW, NM()], ids=str)
def test_scores_that_overflow_are_named(pattern: Pattern, weight: torch.Tensor, statistics: InputStatistics) -> None:
    weight[3, 3] = 1e30
    with pytest.raises(ValueError, match=r"scores need to be finite.* for `q_proj`"):
        SparseGPT().prune(weight, statistics, pattern, "q_proj")


@pytest.mark.parametrize("norms", [False, True], ids=["nothing", "norms only"])
def test_sparsegpt_says_what_it_lacks(norms: bool, weight: torch.Tensor) -> None:
    statistics = InputStatistics(3, sum_squares=torch.ones(24)) if norms else None
    for ask in (
        lambda c: c.prune(weight, statistics, NM(), "q_proj"),
        lambda c: c.scores(weight, statistics, "q_proj"),
    ):
        with pytest.raises(ValueError, match="sparsegpt needs the Gram matrix of the inputs of `q_proj`, got none"):
            ask(SparseGPT())


def test_patterns_that_do_not_fit_are_refused(weight: torch.Tensor, statistics: InputStatistics) -> None:
    refused: dict[str, tuple[Pattern, SparseGPT]] = {
        "got 50% per model for `q_proj`": (Unstructured(0.5, "model"), SparseGPT()),
        "2:5 needs in_features divisible by 5, got 24 for `q_proj`": (NM(2, 5), SparseGPT()),
        "a threshold per matrix, got 60% per row for `q_proj`": (ROW, SparseGPT(published_counts=True)),
    }
    for message, (pattern, criterion) in refused.items():
        with pytest.raises(ValueError, match=message):
            criterion.prune(weight, statistics, pattern, "q_proj")


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`block` .* needs to be >= 1, got 0"):
        SparseGPT(block=0)
    for damping in (-0.01, float("nan")):
        with pytest.raises(ValueError, match="`damping` needs to be >= 0"):
            SparseGPT(damping=damping)


def test_name_and_needs() -> None:
    assert str(SparseGPT()) == "sparsegpt"
    assert SparseGPT.needs == "gram"
    assert SparseGPT.moves_weights
