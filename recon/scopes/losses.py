"""The training losses: of a window against its target, and of the whole model.

Pure functions of tensors. The scopes train with them, and the planner runs them on fake tensors to predict memory.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

WindowLoss = Literal["normalised", "mse", "cosine"]
"""The loss of a window:

- `normalised`: squared error, divided by the squared norm of the batch's target;
- `mse`: mean squared error;
- `cosine`: one minus the cosine similarity of output and target, averaged over tokens.
"""

ModelLoss = Literal["cross_entropy", "distillation"]
"""The loss of the whole model: `cross_entropy` on the next token, or `distillation`, the KL divergence from the dense
model's next-token distribution."""


def window_loss(
    output: Float[Tensor, "batch seq dim"], target: Float[Tensor, "batch seq dim"], loss: str
) -> Float[Tensor, ""]:
    """Compare a window's output with its target.

    Args:
        output: Output of the window, fp32.
        target: Output that the window should give, fp32.
        loss: One of `WindowLoss`.
    """
    if loss == "cosine":
        return 1 - F.cosine_similarity(output, target, dim=-1).mean()
    error = (output - target).square()
    return error.mean() if loss == "mse" else error.sum() / target.square().sum()


def next_token_logits(logits: Float[Tensor, "batch seq vocabulary"]) -> Float[Tensor, "predictions vocabulary"]:
    """Return the fp32 logits of every position but the last, which has no next token; one row a prediction."""
    return logits[:, :-1].float().flatten(0, 1)


def cross_entropy(
    logits: Float[Tensor, "predictions vocabulary"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Average the cross-entropy of the next token over all predictions, in nats.

    Args:
        logits: Result of `next_token_logits`.
        tokens: Token ids of the same batch.
    """
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def distillation(
    student: Float[Tensor, "predictions vocabulary"],
    teacher: Float[Tensor, "predictions vocabulary"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Average KL(teacher || student) over all predictions, times the squared temperature (Hinton et al., 1503.02531).

    The factor keeps gradients at the same size for every temperature.

    Args:
        student: Logits of the model that learns, as `next_token_logits` gives them.
        teacher: Logits of the dense model, without gradient.
        temperature: Softens both distributions: logits are divided by it.
    """
    t = temperature
    log_p, log_q = F.log_softmax(student / t, dim=-1), F.log_softmax(teacher / t, dim=-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * t * t


def cross_entropy_of_chunk(
    logits: Float[Tensor, "rows vocabulary"], targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows vocabulary"]]:
    """Add up the cross-entropy of some predictions.

    Args:
        logits: Of these predictions, in any precision.
        targets: The next tokens.

    Returns:
        The sum, and its gradient with respect to the logits, both fp32.
    """
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    del logits
    at = targets[:, None]
    loss = -log_p.gather(1, at).sum()
    gradient = log_p.exp_()
    return loss, gradient.scatter_(1, at, gradient.gather(1, at) - 1)


def distillation_of_chunk(
    student: Float[Tensor, "rows vocabulary"], teacher: Float[Tensor, "rows vocabulary"], temperature: float = 1.0
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows vocabulary"]]:
    """Add up the loss of `distillation` of some predictions, and overwrite the logits.

    Args:
        student: Logits of the model that learns, in any precision.
        teacher: Logits of the dense model.
        temperature: See `distillation`.

    Returns:
        The sum, and its gradient with respect to the student's logits, both fp32.
    """
    t = temperature
    log_p = F.log_softmax(student.float().div_(t), dim=-1)
    del student
    log_q = F.log_softmax(teacher.float().div_(t), dim=-1)
    del teacher
    difference = log_q - log_p
    q = log_q.exp_()
    loss = difference.mul_(q).sum() * t * t
    return loss, log_p.exp_().sub_(q).mul_(t)


def check_finite(loss: Tensor, where: str) -> None:
    """Stop a run whose loss is no number.

    Raises:
        FloatingPointError: If `loss` is NaN or infinite, with the place and the usual cures.
    """
    if not loss.isfinite():
        raise FloatingPointError(
            f"the loss must be finite, got {loss.item()} in {where}; lower model.lr, or use a wider trainer.precision"
        )
