"""Checks that a model can take token sequences, made before anything is computed with them."""

import logging

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data.token_source import TokenSource

log = logging.getLogger("recon")


def require_tokenizer(source: TokenSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a source can use a tokenizer.

    Raises:
        ValueError: Naming what it lacks, and the cure.
    """
    if lack := source.lack(tokenizer):
        raise ValueError(lack)


def require_text(tokens: Int64[Tensor, "num seq_len"], tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Check that sequences hold more than special and unknown tokens.

    One log line tells the number of sequences that do not.

    Args:
        tokens: Ids of `tokenizer`.
        tokenizer: Names its special tokens; the unknown token is one of them.
        origin: What to call the text in the message.

    Raises:
        ValueError: If no sequence does.
    """
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=tokens.dtype)
    num_empty = int(torch.isin(tokens, special).all(dim=1).sum())
    if num_empty == len(tokens):
        raise ValueError(
            f"{origin} needs tokens that stand for text, got {num_empty} of {len(tokens)} sequences of special and "
            f"unknown tokens only; give the tokenizer of this language as model.tokenizer, or other text"
        )
    if num_empty:
        log.warning(f"{num_empty} of {len(tokens)} sequences of {origin} hold special and unknown tokens only")


def require_embeddings(tokens: Int64[Tensor, "num seq_len"], model: PreTrainedModel, origin: str) -> None:
    """Check that each token has an embedding in `model`.

    Raises:
        ValueError: If one has not; the forward pass would fail with an index error.
    """
    require_ids(int(tokens.min()), int(tokens.max()), model, origin)


def require_ids(smallest: int, largest: int, model: PreTrainedModel, origin: str) -> None:
    """Check that each token id from the smallest to the largest has an embedding in `model`.

    Raises:
        ValueError: If one has not; the forward pass would fail with an index error.
    """
    num_embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
    if smallest < 0 or largest >= num_embeddings:
        raise ValueError(
            f"{origin} needs token ids from 0 to {num_embeddings - 1}, for which the model has embeddings, got "
            f"{smallest} to {largest}; give the model's own tokenizer as model.tokenizer"
        )


def require_positions(seq_len: int, model: PreTrainedModel) -> None:
    """Check that `model` has a position for each token of a sequence.

    One log line tells that a model which computes its positions was trained on shorter sequences.

    Raises:
        ValueError: If positions are rows of a table that is too short.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or seq_len <= longest:
        return
    if _has_position_table(model, longest):
        raise ValueError(
            f"data.seq_len must be at most {longest}, the length of the model's table of positions, got {seq_len}; "
            f"give --data.seq_len {longest}"
        )
    log.warning(
        f"data.seq_len {seq_len} exceeds the {longest} positions the model was made for (max_position_embeddings); "
        f"its perplexity may be poor"
    )


def _has_position_table(model: PreTrainedModel, longest: int) -> bool:
    """Whether a table beside the token embeddings has a row for each position.

    Learned tables may have a few rows more, for padding; computed tables and causal masks are buffers.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            if longest <= module.num_embeddings <= longest + 8:
                return True
        elif any(buffer.dim() > 1 and longest in buffer.shape for buffer in module.buffers(recurse=False)):
            return True
    return False
