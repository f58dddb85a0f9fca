"""How far a recovered model has drifted from the dense one: after each block, and in what it predicts.

Local scopes only ever see the error of one window with dense inputs. What enters a block of the recovered
model is already wrong, so errors add up over depth, or are repaired on the way: this is where that is measured.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.evaluation.perplexity import CHUNK, NOT_FINITE
from recon.models.anatomy import Anatomy, Block
from recon.models.forwards import first_of
from recon.profiling.ledger import sampled

Logits = Float[Tensor, "token vocabulary"]


@dataclass(frozen=True)
class Drift:
    """The distance of a model to the dense one, on the same tokens.

    Attributes:
        hidden: Error of the hidden state after each block, in the order of depth: ||h - h_dense||^2 / ||h_dense||^2,
            both sums over all tokens. Squared and relative, as the held-out errors of windows are.
        kl: KL(dense || model) of the next-token distributions in nats, mean over predicted tokens.
        split: Which split was run.
        num_sequences: Sequences run, each on its own.
        seq_len: Tokens per sequence; the last of each predicts nothing that is scored.
    """

    hidden: list[float]
    kl: float
    split: str
    num_sequences: int
    seq_len: int


@torch.no_grad()
def measure_drift(
    dense: PreTrainedModel,
    recovered: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    split: str = "validation",
    device: torch.device | None = None,
) -> Drift:
    """Run both models side by side and compare the outputs of their blocks and their predictions.

    Differences are taken in fp32 and summed in fp64. Of a batch, the dense model's hidden states are held until
    the other model has come as far; nothing is held over batches.

    Args:
        dense: The reference, in evaluation mode.
        recovered: What it is compared with, in evaluation mode, on the same device.
        batches: Dicts with `input_ids`, int64[batch, seq_len], all of one length.
        split: What to call the data.
        device: Where to compute, if not where the first parameter is.

    Raises:
        ValueError: If the models differ in depth, or do not call each block exactly once.
        FloatingPointError: If a hidden state or a logit is no number; names the block and the batch.
    """
    device = device or next(dense.parameters()).device
    blocks, others = Anatomy.of(dense).blocks, Anatomy.of(recovered).blocks
    require_same_depth(blocks, others)
    error, size = torch.zeros(2, len(blocks), dtype=torch.float64)
    references: dict[int, Tensor] = {}

    def compare(depth: int, hidden: Tensor) -> None:
        reference = references.pop(depth).float()
        error[depth] += energy(hidden.float() - reference)
        size[depth] += energy(reference)

    total, num_sequences, seq_len, predicted = 0.0, 0, 0, 0
    for index, batch in enumerate(sampled(batches, "drift")):
        ids = batch["input_ids"].to(device)
        where = f"{split} batch {index}"
        logits_dense = _run(dense, blocks, ids, references.__setitem__)
        logits = _run(recovered, others, ids, compare)
        require_finite(size, blocks, f"the dense model, {where}")
        require_finite(error, blocks, f"the recovered model, {where}")
        for reference, other in zip(logits_dense, logits, strict=True):  # views: logits are the largest tensors
            total += divergence(reference[:-1], other[:-1])
        del logits_dense, logits, reference, other  # before the next ones are computed
        if not math.isfinite(total):
            raise FloatingPointError(f"logits must be finite, got NaN or infinity in {where}; {NOT_FINITE}")
        num_sequences, seq_len, predicted = num_sequences + len(ids), ids.shape[1], predicted + ids[:, 1:].numel()
    return Drift((error / size).tolist(), total / predicted, split, num_sequences, seq_len)


def require_same_depth(dense: list[Block], recovered: list[Block]) -> None:
    """Raise a `ValueError` if two models cannot be compared block by block."""
    if len(dense) != len(recovered):
        raise ValueError(
            f"drift needs two models of the same depth, got {len(dense)} dense blocks and {len(recovered)} recovered "
            "ones; compare a model with the one it was made from"
        )


def _run(model: PreTrainedModel, blocks: list[Block], ids: Tensor, visit: Callable[[int, Tensor], None]) -> Tensor:
    """The logits for `ids`; `visit(depth, hidden)` is told what each block returns."""
    calls = [0] * len(blocks)

    def hook(depth: int) -> Callable[..., None]:
        def tell(module: nn.Module, args: Any, output: Any) -> None:
            calls[depth] += 1
            if calls[depth] == 1:
                visit(depth, first_of(output))

        return tell

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.module.register_forward_hook(hook(block.index)))
        logits = model(input_ids=ids, use_cache=False).logits
    for block, times in zip(blocks, calls, strict=True):
        if times != 1:
            raise ValueError(
                f"drift needs a model that calls each block once, {block.name} was called {times} times; "
                "leave it out with --drift false"
            )
    return logits


def energy(hidden: Tensor) -> Tensor:
    """The sum of squares in fp64, on the CPU."""
    return hidden.square().sum(dtype=torch.float64).cpu()


def divergence(dense: Logits, other: Logits) -> float:
    """KL(dense || other) summed over tokens, in fp32, `CHUNK` tokens at a time."""
    total = 0.0
    for p, q in zip(dense.split(CHUNK), other.split(CHUNK), strict=True):
        log_p, log_q = F.log_softmax(p.float(), dim=-1), F.log_softmax(q.float(), dim=-1)
        total += float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dtype=torch.float64))
    return total


def require_finite(sums: Tensor, blocks: list[Block], where: str) -> None:
    """Raise a `FloatingPointError` that names the first block whose sum is none."""
    for block, value in zip(blocks, sums.tolist(), strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(f"hidden states must be finite, got NaN or infinity after {block.name} of {where}")
