import math

import pytest
import torch
from torch.utils.data import DataLoader

from recon.evaluation.perplexity import CHUNK, Evaluation, StablePerplexity, evaluate
from tests.support.families import VOCABULARY, tiny, token_ids


def batches(ids: torch.Tensor, batch_size: int) -> DataLoader:
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def by_hand(model, ids: torch.Tensor) -> float:
    """One sequence at a time, one token at a time, fp64."""
    losses = []
    for sequence in ids:
        with torch.no_grad():
            logits = model(input_ids=sequence[None]).logits[0].double()
        for position, target in enumerate(sequence[1:].tolist()):
            losses.append(float(logits[position].exp().sum().log() - logits[position, target]))
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_is_exp_of_the_mean_negative_log_likelihood(dtype, tolerance, batch_size):
    model, ids = tiny("llama").to(dtype), token_ids(batch=7, seq=13)
    if dtype == torch.bfloat16 and batch_size > 1:
        tolerance = 1e-2  # the model itself rounds differently in another batch; the likelihood does not
    evaluation = evaluate(model, batches(ids, batch_size))
    assert evaluation.perplexity == pytest.approx(by_hand(model, ids), rel=tolerance)
    assert evaluation.perplexity != pytest.approx(VOCABULARY, rel=1e-3)
    assert evaluation.protocol == {
        "split": "test",
        "num_sequences": 7,
        "seq_len": 13,
        "tokens_scored": 7 * 12,
        "logits": "float32",
    }


def test_losses_of_sequences_are_those_of_each_alone_and_add_up_to_the_perplexity():
    model, ids = tiny("llama"), token_ids(batch=5, seq=9)
    evaluation = evaluate(model, batches(ids, 2))
    alone = [8 * math.log(by_hand(model, ids[i : i + 1])) for i in range(5)]
    assert evaluation.losses == pytest.approx(alone, abs=1e-3)
    assert math.exp(sum(evaluation.losses) / 40) == pytest.approx(evaluation.perplexity, rel=1e-5)


def test_every_token_counts_the_same_in_a_ragged_last_batch():
    model, ids = tiny("llama"), token_ids(batch=5, seq=9)
    whole = evaluate(model, batches(ids, 5), "validation")
    ragged = evaluate(model, batches(ids, 4), "validation")
    assert ragged.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert ragged.protocol == whole.protocol
    assert whole.split == "validation"


@pytest.mark.parametrize("num_tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_chunks_add_up(num_tokens):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, 11, generator=generator)
    targets = torch.randint(11, (num_tokens,), generator=generator)
    metric = StablePerplexity()
    metric.update(logits, targets)
    losses = logits.double().logsumexp(1) - logits.double().gather(1, targets[:, None])[:, 0]
    assert float(metric.compute()) == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert int(metric.count) == num_tokens


def test_a_probability_below_the_smallest_number_is_a_large_loss_not_an_infinite_one():
    metric = StablePerplexity()
    metric.update(torch.tensor([[0.0, 150.0], [150.0, 0.0]]), torch.tensor([0, 0]))
    assert float(metric.compute()) == pytest.approx(math.exp(75), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_name_the_batch(value):
    model, ids = tiny("llama"), token_ids(batch=6, seq=8).clamp(max=VOCABULARY - 2)
    ids[4, 3] = VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = value
    with pytest.raises(FloatingPointError, match=r"logits must be finite, got NaN or infinity in validation batch 2"):
        evaluate(model, batches(ids, 2), "validation")


def test_leaves_no_gradient_and_no_cache():
    model = tiny("llama")
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["use_cache"]), with_kwargs=True)
    assert isinstance(evaluate(model, batches(token_ids(), 1)), Evaluation)
    assert calls == [False, False]
    assert all(parameter.grad is None for parameter in model.parameters())
