"""Perplexity, measured one way everywhere, with the protocol named beside the number."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from recon.profiling.ledger import sampled

CHUNK = 1024
"""Tokens whose logits are cast to fp32 at a time."""

NOT_FINITE = "look for NaN in the weights, or load the model in a wider model.dtype"
"""Cures for logits that are not finite."""


class StablePerplexity(Perplexity):
    """torchmetrics' perplexity, from the log-softmax of fp32 logits.

    torchmetrics takes softmax and then log, in the dtype it is given: infinite where a probability is below
    fp32's smallest number, as badly pruned models have them, and 0.1 % off on bf16 logits.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[Tensor] = []  # of each sequence, summed over its tokens

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [token, vocabulary] of one sequence and the tokens [token] that they should predict."""
        parts = []
        for logits, tokens in zip(preds.split(CHUNK), target.split(CHUNK), strict=True):
            parts.append(F.cross_entropy(logits.float(), tokens, reduction="sum"))
            self.total_log_probs += parts[-1]
            self.count += tokens.numel()
        self.losses.append(torch.stack(parts).sum())


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and how it was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        split: Which split was scored.
        num_sequences: Sequences scored, each on its own: no context crosses their borders.
        seq_len: Tokens per sequence; the first of each is context only.
        tokens_scored: Predicted tokens.
        logits: Precision in which the likelihood was computed.
        losses: Negative log-likelihood of each sequence, in nats, summed over its predicted tokens; to four decimals.
    """

    perplexity: float
    split: str
    num_sequences: int
    seq_len: int
    tokens_scored: int
    logits: str = "float32"
    losses: list[float] = field(default_factory=list, repr=False)

    @property
    def protocol(self) -> dict[str, str | int]:
        """All but the numbers."""
        return {name: value for name, value in asdict(self).items() if name not in ("perplexity", "losses")}


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, batches: DataLoader, split: str = "test", device: torch.device | None = None
) -> Evaluation:
    """Perplexity of `model` on batches of equally long token sequences.

    Args:
        model: In evaluation mode, on the device to compute on.
        batches: Dicts with `input_ids`, int64[batch, seq_len].
        split: What to call the data in the protocol.
        device: Where to compute, if not where the first parameter is.

    Raises:
        FloatingPointError: If a batch gives logits that are no numbers.
    """
    device = device or next(model.parameters()).device

    def logits() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            ids = batch["input_ids"].to(device)
            yield ids, model(input_ids=ids, use_cache=False).logits

    return score(sampled(logits(), "evaluate"), split, device)


def score(batches: Iterable[tuple[Tensor, Tensor]], split: str, device: torch.device) -> Evaluation:
    """Perplexity from token ids, int64[batch, seq_len], and logits for them, [batch, seq_len, vocabulary].

    Raises:
        FloatingPointError: If a batch has logits that are no numbers.
    """
    options: Any = {"sync_on_compute": False}  # one rank may evaluate while others wait
    metric = StablePerplexity(**options).to(device)
    num_sequences = seq_len = scored = 0
    index = 0
    for ids, logits in batches:
        for sequence, tokens in zip(logits, ids, strict=True):  # views: the logits are the largest tensor here
            metric.update(sequence[:-1], tokens[1:])
        if not torch.isfinite(metric.total_log_probs):
            raise FloatingPointError(
                f"logits must be finite, got NaN or infinity in {split} batch {index}; {NOT_FINITE}"
            )
        num_sequences, seq_len, scored = num_sequences + len(ids), ids.shape[1], scored + ids[:, 1:].numel()
        index += 1  # noqa: SIM113 -- `enumerate` holds a batch's logits while the next ones are computed
        del ids, logits, sequence, tokens
    losses = [round(one, 4) for one in torch.stack(metric.losses).tolist()] if metric.losses else []
    return Evaluation(float(metric.compute()), split, num_sequences, seq_len, scored, losses=losses)
