"""Layers and patterns for the criteria that minimise the error of reconstruction, and what holds for all of them."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria.base import Criterion
from recon.pruning.patterns import NM, Pattern, Unstructured
from tests.support import references

GOLDEN = Path(__file__).parents[1] / "golden"

PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.0),
    Unstructured(0.99),
    Unstructured(0.3, "matrix"),
    Unstructured(0.99, "matrix"),
    NM(),
    NM(1, 4),
    NM(4, 8),
    NM(2, 3),
    NM(4, 4),
]


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    X = inputs.reshape(-1, inputs.shape[-1])
    return InputStatistics(len(X), gram=X.T @ X)


def random_layer(out: int = 10, in_: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and 4 batches of correlated inputs, 30 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_, generator=generator)
    return weight, torch.randn(4, 30, in_, generator=generator) @ torch.randn(in_, in_, generator=generator)


def golden_layer(layer: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The weight, the inputs (tokens x in) and all published results of layer "a" or "b"."""
    tensors = load_file(GOLDEN / f"layer_{layer}.safetensors")
    return tensors["weight"], tensors["inputs"].flatten(0, 1), tensors


def distance(weight: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((weight - expected).norm() / expected.norm())


def assert_counts(keep: torch.Tensor, pattern: Pattern) -> None:
    """Exactly as many are kept as the pattern says, in each row, group or matrix."""
    if isinstance(pattern, NM):
        assert (keep.reshape(-1, pattern.of).sum(1) == pattern.keep).all()
        return
    assert isinstance(pattern, Unstructured)
    groups = keep if pattern.per == "row" else keep.reshape(1, -1)
    assert (groups.sum(1) == groups.shape[1] - round(pattern.sparsity * groups.shape[1])).all()


def assert_contract(criterion: Criterion, pattern: Pattern) -> None:
    """Counts, types, zeros; arguments untouched; the same again; the same for any layout and order of batches."""
    weight, inputs = random_layer()
    statistics = statistics_of(inputs)
    assert statistics.gram is not None
    before, gram = weight.clone(), statistics.gram.clone()
    after, keep = criterion.prune(weight, statistics, pattern, "m")
    assert_counts(keep, pattern)
    assert keep.dtype == torch.bool
    assert torch.equal(weight, before)
    assert torch.equal(statistics.gram, gram)
    if criterion.moves_weights:
        assert after.dtype == torch.float32
        assert not after[~keep].any()
        assert not torch.signbit(after[~keep]).any()
    else:
        assert after is weight

    again, kept_again = criterion.prune(weight, statistics, pattern, "other name")
    assert torch.equal(keep, kept_again)
    assert torch.equal(after, again)

    _, kept_transposed = criterion.prune(weight.T.contiguous().T, statistics, pattern, "m")
    assert torch.equal(keep, kept_transposed)

    reordered, kept_reordered = criterion.prune(weight, statistics_of(inputs.flip(0)), pattern, "m")
    assert torch.equal(keep, kept_reordered)
    torch.testing.assert_close(after, reordered, rtol=1e-3, atol=1e-3)


def assert_dead_columns_go_first(criterion: Criterion, pattern: Pattern) -> None:
    """Inputs that never occurred are pruned before all others; those in excess of the zeros become or stay finite."""
    weight, inputs = random_layer()
    weight, inputs = weight.clone(), inputs.clone()
    dead = [1, 6, 17]
    weight[:, dead] *= 100
    inputs[..., dead] = 0
    after, keep = criterion.prune(weight, statistics_of(inputs), pattern, "m")
    assert not keep[:, dead].any()
    assert after.isfinite().all()
    assert_counts(keep, pattern)

    mostly_dead = torch.zeros_like(inputs)
    mostly_dead[..., 18:20] = inputs[..., 18:20]
    after, keep = criterion.prune(weight, statistics_of(mostly_dead), pattern, "m")
    assert keep[:, 18:20].all()
    assert_counts(keep, pattern)
    assert after.isfinite().all()
    assert references.relative_error(after * keep, weight, mostly_dead) < 1e-10
