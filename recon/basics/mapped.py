"""Tensors that live in a file instead of memory, as long as somebody holds them."""

import math
import os
from collections.abc import Sequence
from mmap import ALLOCATIONGRANULARITY, mmap
from os import SEEK_END
from typing import IO

import torch
from torch import Tensor


def mapped(file: IO[bytes], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor at the end of `file`, whose pages the system reads and writes back as it sees fit.

    A file without a name (`tempfile.TemporaryFile`) may be closed at once: its content goes with the last tensor in
    it, or with the process, however that ends.

    Raises:
        OSError: If the disk has no room for all of it. Without reserving it the process would be killed where it
            first writes to a page that the disk has no room for.
    """
    length = math.prod(shape) * dtype.itemsize
    start = -(-file.seek(0, SEEK_END) // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, length)
    else:  # macOS
        file.truncate(start + length)
    return torch.frombuffer(mmap(file.fileno(), length, offset=start), dtype=dtype).view(*shape)
