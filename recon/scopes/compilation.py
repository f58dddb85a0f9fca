"""torch.compile for what trains."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from recon.anatomy import Block
from recon.calls import forward_replaced


def compiled(blocks: Sequence[Block]) -> ExitStack:
    """Run the submodules of these blocks compiled, until the stack is closed; hooks inside them may be left out.

    A block itself is not compiled, for attention is tapped and replaced between its submodules. Blocks of one kind
    share what was compiled for the first, since weights are inputs of the compiled code.
    """
    stack = ExitStack()
    for block in blocks:
        for module in block.module.children():
            stack.enter_context(forward_replaced(module, torch.compile(module.forward)))
    return stack
