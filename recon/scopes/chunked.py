"""The loss of the whole model from hidden states, some tokens at a time: the logits never exist as a whole.

Logits of 4096 tokens over a vocabulary of 128 256 take 2 GiB in fp32, and a loss of whole logits needs several tensors
of that size. Here each chunk of tokens gives its part of the loss and of the gradients at once, so nothing of it is
kept and no product is computed twice.

`torch.nn.functional.linear_cross_entropy` works alike, from torch 2.13 on. It is not used: it knows no distillation and
no autocast, and its memory is hidden from the planner, which runs this code on tensors without numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Takes the logits of a chunk, which it may overwrite, and the chunk's rows among all predictions; returns the sum of
its losses and its gradient with respect to the logits, both fp32."""


def mean_over_chunks(
    hidden: Float[Tensor, "predictions dim"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None,
    loss_of: ChunkLoss,
    rows: int,
) -> Float[Tensor, ""]:
    """Average a loss of the logits `hidden @ weight.T + bias` over all predictions.

    Products are computed in autocast's precision, or in that of `hidden`; sums over chunks are fp32.

    Args:
        hidden: What enters the head, one row a prediction.
        weight: Of the head.
        bias: Of the head.
        loss_of: The loss of a chunk.
        rows: Predictions in a chunk.
    """
    loss: Any = _MeanOverChunks.apply(hidden, weight, bias, loss_of, rows, torch.is_grad_enabled())
    return loss


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The precision in which a linear map of `hidden` is computed here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _MeanOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss_of: ChunkLoss, rows: int, learns: bool
    ) -> Tensor:
        dtype = product_dtype(hidden)
        cast, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        by_hidden, by_weight, by_bias = (
            torch.zeros_like(one, dtype=torch.float32) if learns and needed and one is not None else None
            for one, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, min(start + rows, len(hidden)))
            entering = hidden[chunk].to(dtype)
            part, gradient = loss_of(F.linear(entering, cast, cast_bias), chunk)
            loss += part
            if by_bias is not None:
                by_bias += gradient.sum(0)
            gradient = gradient.to(dtype)
            if by_hidden is not None:
                by_hidden[chunk] = gradient @ cast
            if by_weight is not None:
                by_weight += gradient.T @ entering
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.num, ctx.dtypes = len(hidden), (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the gradient of a head may be as large as all logits. A second backward pass is then refused.
        factor = outer[0] / ctx.num
        scaled = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None
