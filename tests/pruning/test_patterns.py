"""Patterns choose exactly as many weights as they say, and always the same ones."""

import pytest
import torch

from recon.pruning.patterns import NM, Counted, Pattern, Unstructured
from tests.support.references import keep_highest, keep_per_group, keep_per_row


def scores_with_ties(out: int, in_: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-3, 4, (out, in_), generator=torch.Generator().manual_seed(seed)).float() / 2


@pytest.mark.parametrize("in_", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.6, 0.99])
def test_a_row_keeps_the_highest_in_exact_number(sparsity: float, in_: int) -> None:
    scores = scores_with_ties(6, in_)
    keep = Unstructured(sparsity).select(scores)
    assert torch.equal(keep, keep_per_row(scores, in_ - round(sparsity * in_)))


@pytest.mark.parametrize(
    ("sparsity", "in_", "num_pruned"),
    [
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.35, 10, 4),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.07, 150, 10),
        (0.175, 180, 32),
    ],
)
def test_counts_follow_the_decimal_that_was_written(sparsity: float, in_: int, num_pruned: int) -> None:
    keep = Unstructured(sparsity).select(torch.rand(3, in_))
    assert (~keep).sum(1).tolist() == [num_pruned] * 3


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_a_matrix_keeps_the_highest_in_exact_number(sparsity: float) -> None:
    scores = scores_with_ties(5, 7)
    keep = Unstructured(sparsity, per="matrix").select(scores)
    assert keep.flatten().tolist() == keep_highest(scores.flatten().tolist(), 35 - round(sparsity * 35))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_the_model_keeps_the_highest_in_exact_number(sparsity: float, seed: int) -> None:
    scores = {
        "b": scores_with_ties(4, 6, seed),
        "a": scores_with_ties(3, 5, seed + 9),
        "c": torch.rand(2, 3) - 0.5,
    }
    masks = Unstructured(sparsity, per="model").select_all(scores)
    assert list(masks) == ["b", "a", "c"]
    chosen = [kept for keep in masks.values() for kept in keep.flatten().tolist()]
    flat = [score for matrix in scores.values() for score in matrix.flatten().tolist()]
    assert chosen == keep_highest(flat, 45 - round(sparsity * 45))


def test_the_model_ranks_every_kind_of_float() -> None:
    tiny = 2.0**-149
    scores = {"m": torch.tensor([[0.0, -0.0, tiny, -tiny, 3e38, -3e38, 1.0, 1.0 + 2**-23]])}
    for num_pruned in range(8):
        masks = Unstructured(num_pruned / 8, per="model").select_all(scores)
        assert masks["m"][0].tolist() == keep_highest(scores["m"][0].tolist(), 8 - num_pruned)


def test_equal_scores_keep_the_lower_index() -> None:
    scores = torch.ones(2, 4)
    assert Unstructured(0.5).select(scores).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert Unstructured(0.5, per="matrix").select(scores).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert NM(1, 2).select(scores).int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    masks = Unstructured(0.5, per="model").select_all({"z": torch.ones(1, 2), "a": torch.ones(1, 2)})
    assert masks["z"].all()
    assert not masks["a"].any()


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8), (1, 2), (4, 4)])
def test_n_m_holds_in_every_group(keep: int, of: int) -> None:
    scores = scores_with_ties(6, 3 * of)
    mask = NM(keep, of).select(scores)
    assert (mask.view(-1, of).sum(1) == keep).all()
    assert torch.equal(mask, keep_per_group(scores, keep, of))


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.4), Unstructured(0.4, "matrix"), Unstructured(0.4, "model"), NM(2, 4)]
)
def test_memory_layout_does_not_matter(pattern: Pattern) -> None:
    """Scores of a Conv1D arrive as a transposed view."""
    scores = scores_with_ties(8, 12)
    (contiguous,) = pattern.select_all({"m": scores}).values()
    (transposed,) = pattern.select_all({"m": scores.T.contiguous().T}).values()
    assert torch.equal(contiguous, transposed)


def test_matrices_are_chosen_one_by_one_unless_across_the_model() -> None:
    scores = {"a": torch.rand(4, 8), "b": 100 + torch.rand(2, 4)}
    for pattern in (Unstructured(0.5), Unstructured(0.5, "matrix"), NM()):
        assert not pattern.across_model
        masks = pattern.select_all(scores)
        assert all(torch.equal(masks[name], pattern.select(scores[name])) for name in scores)
    across = Unstructured(0.5, "model")
    assert across.across_model
    assert across.select_all(scores)["b"].all()
    with pytest.raises(ValueError, match=r"50% per model ranks .* cannot choose within `a` alone; call `select_all`"):
        across.select(scores["a"], "a")


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured(per="matrix"), Unstructured(per="model"), NM()])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_without_an_order_are_refused_by_name(pattern: Pattern, bad: float) -> None:
    scores = torch.rand(4, 8)
    scores[1, 2] = bad
    with pytest.raises(ValueError, match=r"finite, got 1 NaN or infinite of 32 for `q_proj`"):
        pattern.select_all({"k_proj": torch.rand(4, 8), "q_proj": scores})


def test_n_m_refuses_inputs_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"^2:4 needs in_features divisible by 4, got 130 for `up_proj`; exclude"):
        NM().select(torch.rand(2, 130), "up_proj")


@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.1, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=f"needs 0 <= sparsity < 1, got {sparsity}"):
        Unstructured(sparsity)


def test_an_unknown_unit_is_refused() -> None:
    pattern = Unstructured(0.5)
    object.__setattr__(pattern, "per", "column")  # past beartype, which tests have and users have not
    with pytest.raises(ValueError, match="one of row, matrix, model, got 'column'"):
        pattern.__post_init__()


@pytest.mark.parametrize(("keep", "of"), [(0, 4), (5, 4), (-1, 4)])
def test_an_impossible_n_m_is_refused(keep: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"needs 1 <= keep <= of, got keep={keep} and of={of}"):
        NM(keep, of)


def test_names_and_densities() -> None:
    names = [str(p) for p in (Unstructured(0.6), Unstructured(0.5, "matrix"), Unstructured(0.55, "model"), NM())]
    assert names == ["60% per row", "50% per matrix", "55% per model", "2:4"]
    assert [Unstructured(0.75).density, NM(1, 4).density] == [0.25, 0.25]
    assert NM() == NM(2, 4) != NM(4, 8)
    assert repr(Unstructured()) == "Unstructured(sparsity=0.6, per='row')"


@pytest.mark.parametrize("zeros", [0, 1, 5, 6, 13, 24])
def test_each_matrix_has_its_own_count_and_rows_differ_by_one(zeros: int) -> None:
    scores = {"a": scores_with_ties(6, 5), "b": scores_with_ties(3, 4, seed=1)}
    pattern = Counted({"a": zeros, "b": 7}, num_weights=42)
    masks = pattern.select_all(scores)
    rows = [keep_highest(row, 5 - zeros // 6 - (i < zeros % 6)) for i, row in enumerate(scores["a"].tolist())]
    assert masks["a"].tolist() == rows
    assert (~masks["b"]).sum(1).tolist() == [3, 2, 2]
    assert pattern.density == pytest.approx(1 - (zeros + 7) / 42)
    per_matrix = Counted({"a": zeros, "b": 7}, 42, "matrix").select_all(scores)
    assert per_matrix["a"].flatten().tolist() == keep_highest(scores["a"].flatten().tolist(), 30 - zeros)
    assert (~per_matrix["b"]).sum() == 7


def test_counts_survive_the_way_through_a_fraction() -> None:
    for num in (3, 49, 128, 4093, 11008 * 4096):
        for zeros in {0, 1, num // 3, num // 2, num - 1}:
            ((_, part),) = Counted({"w": zeros}, num).parts("w", 1, num)
            assert isinstance(part, Unstructured)
            assert num - part.num_kept(num) == zeros


def test_one_pattern_serves_all_rows_unless_their_counts_differ() -> None:
    assert Unstructured(0.5).parts("w", 4, 6) == [(slice(None), Unstructured(0.5))]
    assert NM().parts("w", 4, 8) == [(slice(None), NM())]
    counted = Counted({"w": 8, "v": 9}, 48)
    assert counted.parts("w", 4, 6) == [(slice(0, None), Unstructured(2 / 6))]
    assert counted.parts("v", 4, 6) == [(slice(0, 1), Unstructured(3 / 6)), (slice(1, None), Unstructured(2 / 6))]
    assert [str(counted), str(Counted({}, 0, "matrix"))] == ["35.4% per row", "0% per matrix"]
