"""The training loss of a whole model, from whole logits or in chunks; full retraining and the planner call it."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from recon.scopes.chunked import mean_over_chunks, product_dtype
from recon.scopes.heads import Same, answering, head_of, objection_to_chunks
from recon.scopes.losses import (
    ModelLoss,
    cross_entropy,
    cross_entropy_of_chunk,
    distillation,
    distillation_of_chunk,
    next_token_logits,
)

FP32 = 4

LOGITS_MEMORY = "256MiB"
"""Most memory of a batch's fp32 logits by default."""

log = logging.getLogger("recon")


def logits_bytes(model: PreTrainedModel, batch_size: int, seq_len: int) -> int:
    """Bytes of the fp32 logits of a batch."""
    return batch_size * seq_len * FP32 * model.config.get_text_config().vocab_size


def chunk_rows(
    models: Sequence[PreTrainedModel], memory: int, device: torch.device, same: Same = torch.equal
) -> int | None:
    """How many predictions have fp32 logits of at most `memory` bytes, at least one.

    Args:
        models: The model that learns, and its teacher.
        memory: Bytes.
        device: Where they compute; all processes call this.
        same: See `objection_to_chunks`.

    Returns:
        The number; None, with a warning, if the loss of one of the models needs whole logits.
    """
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    for model in models:
        if objection := objection_to_chunks(model, tokens, same):
            log.warning(f"all logits of a batch are computed at once, model.logits_memory or not: {objection}")
            return None
    return max(1, memory // logits_bytes(models[0], 1, 1))


def model_loss(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch seq"],
    loss: ModelLoss = "cross_entropy",
    teacher: PreTrainedModel | None = None,
    temperature: float = 1.0,
    rows: int | None = None,
) -> Tensor:
    """Average the loss per predicted token.

    Args:
        model: The model that learns.
        tokens: Token ids.
        loss: Which loss.
        teacher: The dense model, for distillation.
        temperature: Of distillation.
        rows: Predictions whose logits exist at a time; all if None. Both heads have to be plain ones then: see
            `objection_to_chunks`.
    """
    if rows is not None:
        if loss == "cross_entropy":
            return _cross_entropy_in_chunks(model, tokens, rows)
        assert teacher is not None
        return _distillation_in_chunks(model, tokens, teacher, temperature, rows)
    logits = next_token_logits(model(input_ids=tokens, use_cache=False).logits)
    if loss == "cross_entropy":
        return cross_entropy(logits, tokens)
    assert teacher is not None
    with torch.no_grad():
        target = next_token_logits(teacher(input_ids=tokens, use_cache=False).logits)
    return distillation(logits, target, temperature)


def _cross_entropy_in_chunks(model: PreTrainedModel, tokens: Tensor, rows: int) -> Tensor:
    head, targets = head_of(model), tokens[:, 1:].flatten()

    def forward(hidden: Tensor) -> Tensor:
        def loss_of(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            return cross_entropy_of_chunk(logits, targets[chunk])

        return mean_over_chunks(_predicting(hidden), head.weight, head.bias, loss_of, rows)

    with answering(head, forward):
        return model(input_ids=tokens, use_cache=False).logits


def _distillation_in_chunks(
    model: PreTrainedModel, tokens: Tensor, teacher: PreTrainedModel, temperature: float, rows: int
) -> Tensor:
    """The teacher runs within the call of the model's head: so both heads have their weights whole at one time."""
    head, teachers = head_of(model), head_of(teacher)

    def forward(hidden: Tensor) -> Tensor:
        found: list[Tensor] = []

        def forward_of_teacher(target: Tensor) -> Tensor:
            rows_of_target = _predicting(target)
            dtype = product_dtype(target)
            weight = teachers.weight.to(dtype)
            bias = None if teachers.bias is None else teachers.bias.to(dtype)

            def loss_of(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
                aim = F.linear(rows_of_target[chunk].to(dtype), weight, bias)
                return distillation_of_chunk(logits, aim, temperature)

            with torch.set_grad_enabled(learns):
                found.append(mean_over_chunks(_predicting(hidden), head.weight, head.bias, loss_of, rows))
            return target

        learns = torch.is_grad_enabled()
        with torch.no_grad(), answering(teachers, forward_of_teacher):
            teacher(input_ids=tokens, use_cache=False)
        return found[0]

    with answering(head, forward):
        return model(input_ids=tokens, use_cache=False).logits


def _predicting(hidden: Tensor) -> Tensor:
    """The hidden states of all positions that have a next token, one row a prediction."""
    return hidden[:, :-1].flatten(0, 1)
