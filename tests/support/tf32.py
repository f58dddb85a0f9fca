"""TF32 on a CPU: products of fp32 matrices whose factors are rounded where the code asks for TF32."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTORS = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.addmm_: 1}
"""Operator -> place of the first of its two factors."""


def rounded(x: Tensor) -> Tensor:
    """Round fp32 to 11 significant bits, to nearest and ties to even, as the conversion to TF32 does."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """Rounds as a device with TF32 does, wherever its products would use it.

    Attributes:
        products: Precision -> multiplications of fp32 matrices inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = {"ieee": 0, "tf32": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, a product on rounded factors if TF32 is chosen."""
        first = FACTORS.get(func.overloadpacket)
        if first is not None and args[first].dtype == torch.float32:
            a, b = args[first : first + 2]
            chosen = torch.backends.cuda.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
            self.products["tf32" if chosen == "tf32" else "ieee"] += a.shape[0] * a.shape[1] * b.shape[1]
            if chosen == "tf32":
                args = (*args[:first], rounded(a), rounded(b), *args[first + 2 :])
        return func(*args, **(kwargs or {}))
