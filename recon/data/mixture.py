"""Several sources in one: exact shares of sequences, each from the same split of its own source."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data.token_source import Draw, Split, TokenSource


class Mixture(TokenSource):
    """Sequences of several sources, in exact shares and in a seeded order.

    A sequence is of one source. All sequences have the same number of tokens, so shares of sequences are shares of
    tokens, too. The number of each source's sequences differs from its exact share by less than one; what rounding
    leaves goes to the largest remainders, of equal ones to the first. Each split is mixed from the same split of every
    source, so the splits are as separate as those of each source by itself.

    Args:
        sources: The sources, each once.
        weights: Relative share of each; equal shares if null.
    """

    def __init__(self, sources: list[TokenSource], weights: list[float] | None = None) -> None:
        self.sources = sources
        self.weights = weights
        if len(sources) < 2:
            raise ValueError(f"data.source.sources needs at least two sources to mix, got {len(sources)}")
        if weights is not None and len(weights) != len(sources):
            raise ValueError(
                f"data.source.weights needs one weight for each of {len(sources)} sources, got {len(weights)}; correct "
                f"it, or leave it out for equal shares"
            )
        if weights is not None and not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"data.source.weights needs numbers above 0, got {weights}; leave a source out instead")

    def __str__(self) -> str:
        return f"the mixture of {' and '.join(str(source) for source in self.sources)}"

    @property
    def is_written(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the dense model writes one of the sources."""
        return any(source.is_written for source in self.sources)

    @property
    def is_particular(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the sources cannot use any tokenizer."""
        return any(source.is_particular for source in self.sources)

    def identity(self) -> dict[str, Any]:
        """The identities and shares of the sources.

        Raises:
            ValueError: If two sources are the same text.
        """
        found = [source.identity() for source in self.sources]
        if twice := next((one for index, one in enumerate(found) if one in found[:index]), None):
            raise ValueError(
                f"data.source.sources needs every source once, got {twice} twice; its sequences would be drawn twice: "
                f"give it a larger weight"
            )
        return {"source": "Mixture", "sources": found, "weights": self.weights}

    def lack(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """See `TokenSource`: what the first source that cannot use the tokenizer lacks."""
        return next(filter(None, (source.lack(tokenizer) for source in self.sources)), None)

    def sequences(self, split: Split, draw: Draw) -> Tensor:
        """See `TokenSource`; all of the split is the most that has the exact shares."""
        shares = _shares(self.weights or [1.0] * len(self.sources))
        if draw.num_sequences is None:
            parts = [source.sequences(split, draw) for source in self.sources]
            num = min(int(len(part) / share) for part, share in zip(parts, shares, strict=True))
            parts = [part[:count] for part, count in zip(parts, apportion(shares, num), strict=True)]
        else:
            num, counts = draw.num_sequences, apportion(shares, draw.num_sequences)
            if 0 in counts:
                raise ValueError(
                    f"{self.origin(split)} needs a sequence of every source, got {num} sequences in shares of "
                    f"{', '.join(f'{float(share):.3g}' for share in shares)}; ask for more sequences, or leave a "
                    f"source out"
                )
            drawn = zip(self.sources, counts, strict=True)
            parts = [source.sequences(split, replace(draw, num_sequences=count)) for source, count in drawn]
        order = torch.randperm(num, generator=torch.Generator().manual_seed(draw.seed))
        return torch.cat(parts)[order]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """The share of each weight in their sum, exactly; a weight is the decimal number that was written."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def apportion(shares: Sequence[Fraction], num: int) -> list[int]:
    """Divide `num` by shares, by the largest remainders.

    Args:
        shares: Their sum is one.
        num: How many there are in all.

    Returns:
        Whole numbers with the sum `num`, each less than one away from its share of it.
    """
    counts = [int(num * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - num * shares[index])  # sorted is stable
    for index in by_remainder[: num - sum(counts)]:
        counts[index] += 1
    return counts
