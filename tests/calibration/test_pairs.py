"""Pairs are the sums over both streams, token by token, and nothing outlives its batch."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from recon.calibration.pairs import Pairs, collect_pairs
from recon.models.matrices import Matrix
from recon.solvers import ConjugateGradients, LeastSquares
from tests.support import references

Stream = list[torch.Tensor]


class Attention(nn.Module):
    """Query and key share an input; the output matrix has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0  # a fresh tensor in each call, freed after it
        return self.o(self.mixed(x))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x)

    def matrices(self, *names: str) -> dict[str, Matrix]:
        return {name: Matrix.of_module(name, getattr(self, name)) for name in names or ("q", "k", "o")}


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().requires_grad_(False)


def stream(seed: int, num: int = 3, sequences: int = 2) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sequences, 7, 6, generator=generator) for _ in range(num)]


def run(pairs: Pairs, model: Callable[[torch.Tensor], object], dense: Stream, recovered: Stream) -> None:
    for a, b in zip(dense, recovered, strict=True):
        with pairs.dense():
            model(a)
        with pairs.recovered():
            model(b)


def test_the_sums_are_those_of_both_streams(attention: Attention) -> None:
    dense, recovered = stream(1), stream(2)
    with collect_pairs(attention.matrices()) as pairs:
        run(pairs, attention, dense, recovered)
        assert pairs.statistics == {}
    inputs = {"q": (torch.cat(dense), torch.cat(recovered))}
    inputs["k"] = inputs["q"]
    inputs["o"] = (attention.mixed(inputs["q"][0]), attention.mixed(inputs["q"][1]))
    for name, (X_d, X) in inputs.items():
        found = pairs.statistics[name]
        cross = sum(torch.outer(a, b) for a, b in zip(X_d.flatten(0, 1), X.flatten(0, 1), strict=True))
        assert found.num_tokens == 3 * 2 * 7
        torch.testing.assert_close(found.gram, references.gram(X).float())
        torch.testing.assert_close(found.cross, cross)
        torch.testing.assert_close(found.dense_gram, references.gram(X_d).float())


def test_they_pose_the_problem_of_recovered_inputs_and_dense_outputs(attention: Attention) -> None:
    dense, recovered = stream(1), [a + 0.3 * b for a, b in zip(stream(1), stream(2), strict=True)]
    keep = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    with collect_pairs(attention.matrices("q")) as pairs:
        run(pairs, attention, dense, recovered)
    weight = attention.q.weight
    solution = ConjugateGradients().solve(LeastSquares.of(pairs.statistics["q"], weight), keep)
    exact = references.masked_least_squares(weight, torch.cat(recovered), keep, torch.cat(dense))
    torch.testing.assert_close(solution.weight.double(), exact, rtol=1e-4, atol=1e-5)


def test_matrices_that_share_their_input_share_the_sums(attention: Attention) -> None:
    with collect_pairs(attention.matrices()) as pairs:
        run(pairs, attention, stream(1), stream(2))
    for field in ("gram", "cross", "dense_gram"):
        totals = {name: getattr(found, field) for name, found in pairs.statistics.items()}
        assert totals["q"] is totals["k"]
        assert totals["q"] is not totals["o"]


def test_equal_streams_have_one_gram_matrix(attention: Attention) -> None:
    with collect_pairs(attention.matrices()) as pairs:
        run(pairs, attention, stream(1), stream(1))
    for found in pairs.statistics.values():
        assert torch.equal(found.cross, found.gram)
        assert torch.equal(found.dense_gram, found.gram)


def test_parts_of_a_model_may_alternate_and_run_twice(attention: Attention) -> None:
    """As blocks do that are run one after the other, or a module that a block calls twice."""
    other = nn.Linear(6, 3)
    dense, recovered = stream(1), stream(2)
    with torch.no_grad(), collect_pairs(attention.matrices("q") | {"other": Matrix.of_module("other", other)}) as pairs:
        for a, b in zip(dense, recovered, strict=True):
            with pairs.dense():
                attention.q(a), attention.q(2 * a)
            with pairs.recovered():
                attention.q(b), attention.q(3 * b)
            run(pairs, other, [a], [b])
    plain = sum(a.flatten(0, 1).T @ b.flatten(0, 1) for a, b in zip(dense, recovered, strict=True))
    torch.testing.assert_close(pairs.statistics["other"].cross, plain)
    torch.testing.assert_close(pairs.statistics["q"].cross, 7 * plain)
    assert pairs.statistics["q"].num_tokens == 2 * pairs.statistics["other"].num_tokens == 84


@pytest.mark.usefixtures("small_heap")
def test_only_dense_inputs_wait_and_none_outlives_its_batch(attention: Attention) -> None:
    def held() -> int:
        gc.collect()
        return sum(isinstance(x, torch.Tensor) and x.shape == (11 * 7, 6) for x in gc.get_objects())

    with torch.no_grad(), collect_pairs(attention.matrices()) as pairs:
        for a, b in zip(stream(1, sequences=11), stream(2, sequences=11), strict=True):
            with pairs.dense():
                attention(a)
            assert held() == 1  # of query and key together
            with pairs.recovered():
                attention(b)
            assert held() == 0


def test_an_input_edited_after_the_call_counts_as_it_was(attention: Attention) -> None:
    def run_and_edit(x: torch.Tensor) -> None:
        x = x.clone()
        attention.q(x)
        x.mul_(100)

    with torch.no_grad(), collect_pairs(attention.matrices("q")) as edited:
        run(edited, run_and_edit, stream(1), stream(2))
    with torch.no_grad(), collect_pairs(attention.matrices("q")) as plain:
        run(plain, attention.q, stream(1), stream(2))
    assert torch.equal(edited.statistics["q"].cross, plain.statistics["q"].cross)


def test_half_precision_inputs_are_summed_in_fp32_whatever_autocast_says() -> None:
    linear = nn.Linear(2, 2, dtype=torch.bfloat16)
    x = torch.ones(4096, 2, dtype=torch.bfloat16)
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        collect_pairs({"m": Matrix.of_module("m", linear)}) as pairs,
    ):
        run(pairs, linear, [x, x[:1]], [x, x[:1]])
    for total in (pairs.statistics["m"].gram, pairs.statistics["m"].cross, pairs.statistics["m"].dense_gram):
        assert total.dtype == torch.float32
        assert total[0, 0] == 4097  # bf16 would have stopped at 256


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("which", ["dense", "recovered"])
def test_an_input_that_is_not_finite_is_refused_by_stream_matrix_and_batch(
    attention: Attention, which: str, bad: float
) -> None:
    streams = {"dense": stream(1), "recovered": stream(2)}
    streams[which][1][0, 3, 2] = bad
    received = {}

    def collecting() -> None:
        with collect_pairs(attention.matrices()) as pairs:
            received["pairs"] = pairs
            run(pairs, attention, streams["dense"], streams["recovered"])

    with pytest.raises(ValueError, match=rf"{which} inputs need .* NaN or Inf in `q` in batch 1 \(counted from 0\)"):
        collecting()
    assert received["pairs"].statistics == {}
    assert not attention.q._forward_pre_hooks


def test_streams_of_different_tokens_are_refused_by_name(attention: Attention) -> None:
    (x,) = stream(1, num=1)

    def collecting(dense: Callable[[], object], recovered: Callable[[], object]) -> None:
        with collect_pairs(attention.matrices("q")) as pairs:
            run(pairs, attention, [x], [x])
            with pairs.dense():
                dense()
            with pairs.recovered():
                recovered()

    def nothing() -> None:
        pass

    with pytest.raises(ValueError, match=r"enter `q` in both .* 14 tokens in the dense stream, 7 tokens in the other"):
        collecting(lambda: attention(x), lambda: attention(x[:1]))
    with pytest.raises(ValueError, match=r"`q` in both .* it was called more often in the dense stream; exclude"):
        collecting(lambda: attention(x), nothing)
    with pytest.raises(
        ValueError, match=r"`q` in both .* no call in the dense stream, 14 tokens in the other, batch 1"
    ):
        collecting(nothing, lambda: attention(x))
    with (
        pytest.raises(ValueError, match=r"`q` in both .* it was not called in the dense stream"),
        collect_pairs(attention.matrices("q")) as pairs,
        pairs.recovered(),
    ):
        attention(x)


def test_a_matrix_that_was_never_called_is_named(attention: Attention) -> None:
    with (
        pytest.raises(ValueError, match="at least one forward call, got none for `o`"),
        collect_pairs(attention.matrices("q", "o")) as pairs,
    ):
        run(pairs, attention.q, stream(1), stream(2))


@pytest.mark.parametrize("which", ["dense", "recovered"])
def test_matrices_that_stop_sharing_are_named(attention: Attention, which: str) -> None:
    first, second = stream(1, num=2)

    def apart(x: torch.Tensor) -> None:
        attention.q(x)
        attention.k(x.clone())

    def collecting() -> None:
        with collect_pairs(attention.matrices("q", "k")) as pairs:
            run(pairs, attention, [first], [first])
            with pairs.dense():
                (apart if which == "dense" else attention)(second)
            with pairs.recovered():
                (apart if which == "recovered" else attention)(second)

    with pytest.raises(ValueError, match=r"`k` shared its first input with `q` .* in batch 1"):
        collecting()


def test_a_dense_stream_without_the_other_is_our_mistake(attention: Attention) -> None:
    (x,) = stream(1, num=1)
    with collect_pairs(attention.matrices()) as pairs:
        run(pairs, attention, [x], [x])
        with pairs.dense():
            attention(x)
        with pytest.raises(AssertionError, match="follows each dense one"), pairs.dense():
            pass
        with pytest.raises(AssertionError, match="follows each dense one"):
            pairs.finish()
        with pairs.recovered():
            attention(x)
    assert not attention.q._forward_pre_hooks


def test_no_matrices_no_statistics(attention: Attention) -> None:
    with collect_pairs({}) as pairs:
        run(pairs, attention, stream(1), stream(2))
    assert pairs.statistics == {}
