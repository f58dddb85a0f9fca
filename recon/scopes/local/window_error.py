"""The output of a window beside its target, and the held-out error that is reported for it."""

from functools import partial

import torch
from torch import Tensor

from recon.calibration.activations import Activations
from recon.models.replay import Replay
from recon.models.windows import Window
from recon.profiling.ledger import sampled
from recon.scopes.local.batches import Batch
from recon.scopes.losses import check_finite


def outputs(replay: Replay, window: Window, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run `window` on the inputs of a batch.

    Returns:
        Its output and its target, [batch, seq, dim] in fp32.
    """
    dtype = next(iter(window.blocks[0].parameters().values())).dtype
    inputs = {name: one.to(dtype) for name, one in batch.items() if name != "target"}
    output = window.forward(replay, inputs["hidden"], inputs.get("attention"))
    return output.float(), batch["target"].float()


@torch.no_grad()
def held_out_error(replay: Replay, window: Window, held_out: Activations) -> float:
    """Compute the squared error of a window's output on held-out sequences, relative to its target's energy.

    Raises:
        FloatingPointError: If it is no number, naming the window and the batch.
    """
    errors, begins = [], []
    batches = held_out.batches(held_out.rows(), partial(held_out.batch, window))
    for rows, batch in sampled(batches, "held-out error"):
        output, target = outputs(replay, window, batch)
        errors.append(torch.stack(((output - target).square().sum(), target.square().sum())))
        begins.append(rows.start)
    sums = torch.zeros(2, dtype=torch.float64)
    for error, begin in zip(torch.stack(errors).cpu(), begins, strict=True):  # the host waits once for all batches
        check_finite(error[0], f"window {window.name}, held-out batch that begins with sequence {begin}")
        sums += error
    return float(sums[0] / sums[1])
