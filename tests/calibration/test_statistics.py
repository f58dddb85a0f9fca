"""The statistics are those of the inputs that went by, each stream of inputs counted once."""

import gc

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recon.calibration.collection import collect
from recon.calibration.statistics import InputStatistics, full_fp32
from recon.models.matrices import Matrix
from tests.support import references


class Attention(nn.Module):
    """Query and key share an input; the output matrix has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)
        self.o = Conv1D(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0  # a fresh tensor in each call, freed after it
        return self.o(self.q(x) * self.k(x))

    def matrices(self, *names: str) -> dict[str, Matrix]:
        return {name: Matrix.of_module(name, getattr(self, name)) for name in names or ("q", "k", "o")}


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention()


def batches(num: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 7, 6, generator=generator) for _ in range(num)]


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gram_and_norms_are_those_of_the_inputs(attention: Attention, no_grad: type) -> None:
    seen = {"q": torch.cat(batches())}
    with no_grad():
        seen["o"] = attention.q(seen["q"]) * attention.k(seen["q"])
        with collect(attention.matrices(), "gram") as grams:
            for batch in batches():
                attention(batch)
        with collect(attention.matrices(), "norms") as norms:
            for batch in batches():
                attention(batch)
    for name, inputs in seen.items():
        expected = references.gram(inputs.detach())
        assert grams[name].num_tokens == norms[name].num_tokens == 3 * 2 * 7
        torch.testing.assert_close(grams[name].gram, expected.float())
        torch.testing.assert_close(grams[name].norms, expected.diagonal().sqrt().float())
        torch.testing.assert_close(norms[name].norms, expected.diagonal().sqrt().float())
        assert grams[name].gram.requires_grad is False
        assert norms[name].gram is None


@pytest.mark.parametrize("need", ["gram", "norms"])
def test_a_shared_input_is_accumulated_once(attention: Attention, need: str) -> None:
    with collect(attention.matrices(), need) as statistics:
        for batch in batches():
            attention(batch)
            gc.collect()
    totals = {name: s.gram if need == "gram" else s.sum_squares for name, s in statistics.items()}
    assert totals["q"] is totals["k"]
    assert totals["q"] is not totals["o"]


def test_equal_inputs_in_different_tensors_are_not_mistaken_for_one(attention: Attention) -> None:
    with torch.no_grad(), collect(attention.matrices("q", "k"), "gram") as statistics:
        for batch in batches():
            attention.q(batch.clone())  # freed at once: the next clone may reuse its id
            attention.k(batch.clone() * 2)
    assert statistics["q"].gram is not statistics["k"].gram
    torch.testing.assert_close(statistics["k"].gram, 4 * statistics["q"].gram)


def test_an_input_edited_in_place_is_another_input(attention: Attention) -> None:
    (x,) = batches(1)
    with torch.no_grad(), collect(attention.matrices("q", "k"), "norms") as statistics:
        attention.q(x)
        attention.k(x.mul_(3))
    torch.testing.assert_close(statistics["k"].norms, 3 * statistics["q"].norms)


def test_a_matrix_that_joins_late_counts_for_itself(attention: Attention) -> None:
    first, second = batches(2)
    with torch.no_grad(), collect(attention.matrices("q", "k"), "gram") as statistics:
        attention.q(first)
        attention.q(second)
        attention.k(second)
    torch.testing.assert_close(statistics["q"].gram, references.gram(torch.cat([first, second])).float())
    torch.testing.assert_close(statistics["k"].gram, references.gram(second).float())


def test_every_call_counts(attention: Attention) -> None:
    (x,) = batches(1)
    with torch.no_grad(), collect(attention.matrices("q"), "gram") as statistics:
        attention.q(x)
        attention.q(x)
        attention.q(input=x[0, 0])
    assert statistics["q"].num_tokens == 2 * 14 + 1
    torch.testing.assert_close(statistics["q"].gram, (2 * references.gram(x) + references.gram(x[0, 0])).float())


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    linear = nn.Linear(2, 2, dtype=torch.bfloat16)
    x = torch.ones(4096, 2, dtype=torch.bfloat16)
    with torch.no_grad(), collect({"m": Matrix.of_module("m", linear)}, "gram") as statistics:
        linear(x)
        linear(x[:1])
    assert statistics["m"].gram.dtype == torch.float32
    assert statistics["m"].gram[0, 0] == 4097  # bf16 would have stopped at 256


def test_autocast_does_not_reach_the_sums(attention: Attention) -> None:
    (x,) = batches(1)
    with torch.no_grad(), collect(attention.matrices("q"), "gram") as plain:
        attention.q(x)
    with (
        torch.no_grad(),
        collect(attention.matrices("q"), "gram") as under_autocast,
        torch.autocast("cpu", torch.bfloat16),
    ):
        attention.q(x)
    assert torch.equal(plain["q"].gram, under_autocast["q"].gram)


def test_full_fp32_restores_the_chosen_precision() -> None:
    def failing() -> None:
        with full_fp32(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            raise KeyError

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(KeyError):
            failing()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_is_collected_when_nothing_is_needed(attention: Attention) -> None:
    with collect(attention.matrices(), "none") as statistics:
        assert not attention.q._forward_pre_hooks
        attention(batches(1)[0])
    assert statistics == {name: InputStatistics(num_tokens=0) for name in "qko"}
    with pytest.raises(ValueError, match='norms need statistics collected with need="norms"'):
        _ = statistics["q"].norms


@pytest.mark.parametrize("need", ["gram", "norms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_an_input_that_is_not_finite_is_refused_by_layer_and_batch(attention: Attention, need: str, bad: float) -> None:
    inputs = batches()
    inputs[1][0, 3, 2] = bad
    received = {}

    def run() -> None:
        with collect(attention.matrices(), need) as statistics:
            received["statistics"] = statistics
            for batch in inputs:
                attention(batch)

    with pytest.raises(ValueError, match=r"NaN or Inf in `q` in batch 1 \(counted from 0\)"):
        run()
    assert received["statistics"] == {}
    assert not attention.q._forward_pre_hooks


def test_a_matrix_that_was_never_called_is_named(attention: Attention) -> None:
    with (
        pytest.raises(ValueError, match="at least one forward call, got none for `o`"),
        collect(attention.matrices("q", "o"), "gram"),
    ):
        attention.q(batches(1)[0])


@pytest.mark.parametrize("k_gets", ["another input", "nothing"])
def test_matrices_that_stop_sharing_are_named(attention: Attention, k_gets: str) -> None:
    first, second = batches(2)

    def run() -> None:
        with collect(attention.matrices("q", "k"), "gram"):
            attention(first)
            attention.q(second)
            if k_gets == "another input":
                attention.k(first)

    with pytest.raises(ValueError, match=r"`k` shared its first input with `q` .* in batch 1"):
        run()


def test_hooks_are_removed(attention: Attention) -> None:
    with collect(attention.matrices(), "gram"):
        attention(batches(1)[0])
    assert not any(module._forward_pre_hooks for module in attention.children())
