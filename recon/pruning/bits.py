"""Masks as bits: eight weights to a byte."""

import math

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def pack(keep: Bool[Tensor, "..."]) -> UInt8[Tensor, "num_bytes"]:
    """Pack eight weights into a byte, row-major, the first in the lowest bit; zeros fill the last byte.

    Packs on the device of `keep`, so that an eighth of its bytes are copied.

    Returns:
        The bytes, on the CPU.
    """
    if keep.device.type != "cpu":
        bits = torch.nn.functional.pad(keep.flatten().to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
        return (bits << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8).cpu()
    return torch.from_numpy(np.packbits(keep.flatten().numpy(), bitorder="little"))


def unpack(packed: UInt8[Tensor, "num_bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """Unpack a mask, on the device of `packed`."""
    num_weights = math.prod(shape)
    if type(packed) is Tensor and packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), count=num_weights, bitorder="little")
        return torch.from_numpy(bits.view(bool)).view(shape)
    shifted = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (shifted & 1).bool().flatten()[:num_weights].view(shape)


def bits_between(packed: UInt8[Tensor, "num_bytes"], num: int, index: int) -> UInt8[Tensor, "some_bytes"]:
    """Cut out the `num` bits from `index * num` on, packed like the others; a view where they fill whole bytes."""
    first, last = index * num, (index + 1) * num
    some = packed[first // 8 : -(-last // 8)]
    if num % 8 == 0:
        return some
    bits = np.unpackbits(some.numpy(), bitorder="little")[first % 8 :][:num]
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def count_bits(packed: UInt8[Tensor, "num_bytes"]) -> int:
    """Count the bits that are set."""
    return int(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))
