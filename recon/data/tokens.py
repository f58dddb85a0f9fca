"""From documents to token sequences of one length: tokenised, joined, cut, chosen with a seed, no padding."""

from array import array
from collections.abc import Iterator
from textwrap import shorten

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data.reading import Documents, unreadable

POOL = 32
"""Size of the pool that sequences are drawn from, relative to their number: one long document does not fill it."""


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
    padding; the sequences are then drawn without replacement from a pool 32 times as large, or from all
    the text if it is shorter. With a separator the documents are pieces of one text, and are joined
    in their own order, empty ones included, as in published WikiText-2 numbers. With
    `num_sequences=None` all of the text is cut, in its own order.

    Args:
        documents: Rows with a column `text`.
        tokenizer: Turns text into token ids; no special tokens are added to a document.
        seq_len: Tokens per sequence.
        num_sequences: How many to choose; None for all, in order.
        seed: Decides the order of the documents and the choice.
        separator: Text between documents; None puts the tokenizer's end-of-sequence token there.
        origin: What to call the text in an error.

    Raises:
        ValueError: If the text cannot be read to its end, or has too few tokens, with the numbers.
    """
    wanted = None if num_sequences is None else num_sequences * POOL * seq_len
    if num_sequences is not None and separator is None:
        documents = documents.shuffle(seed=seed)
    ids = array("i")  # 4 bytes a token: the pool is the most memory that this takes
    for piece in token_ids(batches_of(documents, at_a_time(separator), origin), tokenizer, separator):
        ids.extend(piece)
        if wanted is not None and len(ids) >= wanted:
            break
    num_pool, needed = len(ids) // seq_len, num_sequences or 1
    if num_pool < needed:
        raise ValueError(
            f"{needed} sequences of {seq_len} tokens need {needed * seq_len} tokens, "
            f"{origin} holds {len(ids)}; ask for fewer or shorter sequences, or give more text"
        )
    pool = torch.frombuffer(ids, dtype=torch.int32, count=num_pool * seq_len).view(-1, seq_len)
    if num_sequences is None:
        return pool.long()
    choice = torch.randperm(num_pool, generator=torch.Generator().manual_seed(seed))
    return pool[choice[:num_sequences]].long()


def at_a_time(separator: str | None) -> int:
    """The documents that are tokenised at a time.

    They are few, since the tokenizer's own record of a token takes hundreds of bytes. Lines that are joined with a
    separator are short, and every border between two batches can fall within one token.
    """
    return 16 if separator is None else 10_000


def batches_of(documents: Documents, size: int, origin: str) -> Iterator[list[str]]:
    """Texts of `size` documents at a time; a stream meets damaged data and lost connections only here."""
    batches = iter(documents.iter(batch_size=size))
    while True:
        try:
            rows = next(batches, None)
        except unreadable() as error:
            reason = shorten(f"{error.__cause__ or error}", 500)
            raise ValueError(f"{origin} must be readable to its end, got {type(error).__name__}: {reason}") from error
        if rows is None:
            return
        yield [text or "" for text in rows["text"]]  # pyright: ignore[reportArgumentType, reportCallIssue]


def token_ids(
    batches: Iterator[list[str]], tokenizer: PreTrainedTokenizerBase, separator: str | None
) -> Iterator[list[int]]:
    """Token ids of the joined documents, piece by piece."""
    end: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # pyright: ignore[reportAssignmentType]
    for texts in batches:
        if separator is not None and any(texts):
            yield _encode(tokenizer, [separator.join(texts) + separator])[0]
        elif any(texts):
            for ids in _encode(tokenizer, [text for text in texts if text]):
                yield ids + end


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]
