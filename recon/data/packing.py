"""Sequences that begin where a text begins: conversations and generated texts keep their borders."""

from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor


def packed(
    texts: Iterable[list[int]], seq_len: int, num_sequences: int | None, origin: str
) -> Int64[Tensor, "num_sequences seq_len"]:
    """Fill sequences with whole texts; the last text of each is cut at the sequence's end, and its rest is dropped.

    Args:
        texts: Token ids of each text; no more of them are taken than are needed.
        seq_len: Tokens per sequence.
        num_sequences: How many; None for as many as the texts fill.
        origin: What to call the texts in an error.

    Raises:
        ValueError: If there are too few texts, with the numbers.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for ids in texts:
        row = row + ids
        if len(row) >= seq_len:
            rows.append(row[:seq_len])
            row = []
        if len(rows) == num_sequences:
            break
    if len(rows) < (num_sequences or 1):
        raise ValueError(
            f"{origin} must fill {num_sequences or 1} sequences of {seq_len} tokens, each from the begin of a text "
            f"on, it fills {len(rows)}; ask for fewer or shorter sequences, or give more text"
        )
    return torch.tensor(rows, dtype=torch.int64)
