"""Perplexity and drift of models that are not on the device: block by block over all sequences, then the head.

A forward pass per batch would bring every block once a batch; here each is brought once.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from recon.calibration.activations import Activations
from recon.calibration.storage import ON_DEVICE, Storage
from recon.evaluation.drift import Drift, divergence, energy, require_finite, require_same_depth
from recon.evaluation.perplexity import NOT_FINITE, Evaluation, score
from recon.models.replay import Replay
from recon.profiling.ledger import sampled

Sequences = Int[Tensor, "num seq"]


@torch.no_grad()
def evaluate_blockwise(
    replay: Replay, tokens: Sequences, batch_size: int, split: str = "test", storage: Storage = ON_DEVICE
) -> Evaluation:
    """As `recon.evaluation.evaluate`, to rounding.

    Args:
        replay: The model.
        tokens: Sequences to score.
        batch_size: Sequences per forward pass.
        split: What to call them in the protocol.
        storage: Where hidden states are kept.

    Raises:
        FloatingPointError: If hidden states or logits are no numbers.
    """
    walk = Activations(replay, tokens, batch_size, replay.device, storage=storage)
    for block in replay.anatomy.blocks:
        walk.enter([block.index])
    return score(sampled(_logits(replay, walk, tokens), "head"), split, replay.device)


@torch.no_grad()
def measure_drift_blockwise(
    dense: Replay,
    recovered: Replay,
    tokens: Sequences,
    batch_size: int,
    split: str = "validation",
    storage: Storage = ON_DEVICE,
) -> Drift:
    """As `recon.drift.measure_drift`, to rounding.

    Args:
        dense: The reference.
        recovered: What it is compared with.
        tokens: Sequences to run.
        batch_size: Sequences per forward pass.
        split: What to call them.
        storage: Where hidden states are kept, those of both models.

    Raises:
        ValueError: If the models differ in depth.
        FloatingPointError: If hidden states or logits are no numbers.
    """
    blocks = dense.anatomy.blocks
    require_same_depth(blocks, recovered.anatomy.blocks)
    walks = [Activations(one, tokens, batch_size, one.device, storage=storage) for one in (dense, recovered)]
    sums = torch.zeros(2, len(blocks), dtype=torch.float64)
    for block in blocks:
        for walk in walks:
            walk.enter([block.index])
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            reference, other = (_output(walk, rows).float() for walk in walks)
            sums[:, block.index] += torch.stack((energy(other - reference), energy(reference)))
    require_finite(sums[1], blocks, "the dense model")
    require_finite(sums[0], blocks, "the recovered model")
    total = 0.0
    pairs = zip(*(_logits(one, walk, tokens) for one, walk in zip((dense, recovered), walks, strict=True)), strict=True)
    for index, ((_, logits), (_, others)) in enumerate(sampled(pairs, "head")):
        total += sum(divergence(one[:-1], other[:-1]) for one, other in zip(logits, others, strict=True))
        if not torch.tensor(total).isfinite():
            raise FloatingPointError(
                f"logits must be finite, got NaN or infinity in {split} batch {index}; {NOT_FINITE}"
            )
    predicted = tokens[:, 1:].numel()
    return Drift((sums[0] / sums[1]).tolist(), total / predicted, split, len(tokens), tokens.shape[1])


def _logits(replay: Replay, walk: Activations, tokens: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and logits of each batch, on the device, after the last block was entered."""
    replay.hold(())  # makes room for the head
    with replay.rest_onloaded():
        for start in range(0, len(tokens), walk.batch_size):
            rows = slice(start, start + walk.batch_size)
            ids = tokens[rows].to(replay.device)
            yield ids, replay.head(ids, _output(walk, rows))


def _output(walk: Activations, rows: slice) -> Tensor:
    assert walk.output is not None
    return walk.load(walk.output, rows)
