"""From documents to token sequences of one length: tokenised, joined, cut, chosen with a seed, no padding."""

from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data.sources import Documents

POOL = 32
"""Sequences are chosen from about this many times as many, so that one long document is not all of them."""


def sequences(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    num_sequences: int | None,
    seed: int,
    separator: str | None = None,
    origin: str = "the text",
) -> Int64[Tensor, "num_sequences seq_len"]:
    """Cut documents into sequences of `seq_len` tokens and choose `num_sequences` of them.

    Documents are shuffled with the seed, joined, and cut without gaps or overlap, so no sequence holds
    padding; the sequences are then drawn without replacement from a pool 32 times as large (or from all
    the text, where there is less). With `num_sequences=None` all of the text is cut, in its own order.

    Args:
        documents: Rows with a column `text`.
        tokenizer: Turns text into token ids; no special tokens are added to a document.
        seq_len: Tokens per sequence.
        num_sequences: How many to choose; None for all, in order.
        seed: Decides the order of the documents and the choice.
        separator: Text between documents; None puts the tokenizer's end-of-sequence token there.
        origin: What to call the text in an error.

    Raises:
        ValueError: If the text has too few tokens, with the numbers.
    """
    wanted = None if num_sequences is None else num_sequences * POOL * seq_len
    if num_sequences is not None:
        documents = documents.shuffle(seed=seed)
    pieces, held = [], 0
    for piece in _token_ids(documents, tokenizer, separator):
        pieces.append(torch.tensor(piece, dtype=torch.int64))
        held += len(piece)
        if wanted is not None and held >= wanted:
            break
    ids = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    pool = ids[: held // seq_len * seq_len].view(-1, seq_len)
    needed = num_sequences or 1
    if len(pool) < needed:
        raise ValueError(
            f"{needed} sequences of {seq_len} tokens need {needed * seq_len} tokens, "
            f"{origin} holds {held}; ask for fewer or shorter sequences, or give more text"
        )
    if num_sequences is None:
        return pool
    choice = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[choice[:num_sequences]]


def _token_ids(documents: Documents, tokenizer: PreTrainedTokenizerBase, separator: str | None) -> Iterator[list[int]]:
    """Token ids of the joined documents, piece by piece."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for rows in documents.iter(batch_size=64 if separator is None else 10_000):
        texts = [text for text in rows["text"] if text]  # pyright: ignore[reportArgumentType, reportCallIssue]
        if separator is not None:
            texts, end = [separator.join(texts) + separator], []
        if texts:
            yield from (ids + end for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
