"""fp32 while a window is under way, for steps are often too small for 16 bits."""

from collections.abc import Sequence

import torch
from torch import nn

from recon.anatomy import Block


class Widened:
    """Parameters that are wider than the model's own precision for a while."""

    def __init__(self) -> None:
        self._own: list[tuple[nn.Parameter, torch.dtype]] = []

    def widen(self, blocks: Sequence[Block]) -> None:
        """Have all parameters of these blocks in fp32 until `narrow`."""
        self._own = [(parameter, parameter.dtype) for block in blocks for parameter in block.parameters().values()]
        for parameter, dtype in self._own:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))

    def narrow(self) -> None:
        """Round to the model's own precision, in which a window is written and what follows sees it."""
        for parameter, dtype in self._own:
            parameter.data = parameter.data.to(dtype)
        self._own.clear()
