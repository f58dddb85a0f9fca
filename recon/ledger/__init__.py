"""Live tensor bytes by category, of a device and of the host beside it, and their peak.

A dispatch mode sees each tensor that an operation makes, and a weak reference to its storage tells when the last owner
is gone, so the account is exact, autograd's saved tensors included, and the same on CPU and CUDA. Births and deaths are
logged and added up later: what a gradient is shows only when the backward pass is over. What lived before, or was made
behind the dispatcher's back, is found among the objects that the garbage collector knows.

Where there is no device, what would be on one is told from what would stay behind: see `Side`.

`torch.distributed._tools.mem_tracker` does the like for a training step; it doubled the time of one, raises when a
module runs twice, and knows no activations of calibration. A mode costs some fifteen microseconds an operation, so
samples are followed: whole training steps, and of loops the first turn. Scratch memory inside kernels is not seen, nor
storages that are resized, nor memory-mapped files.
"""

from recon.ledger.account import Ledger, claim, followed, sampled
from recon.ledger.entries import CATEGORIES, SIDES, Category, Entry, Held, Holders, Peak, Side, tensors_in

__all__ = [
    "CATEGORIES",
    "SIDES",
    "Category",
    "Entry",
    "Held",
    "Holders",
    "Ledger",
    "Peak",
    "Side",
    "claim",
    "followed",
    "sampled",
    "tensors_in",
]
