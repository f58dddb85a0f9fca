"""How the weights of one linear map are laid out.

`torch.nn.Linear` keeps its weight as out x in, transformers' `Conv1D` (GPT-2) as in x out. Criteria and
solvers speak of out x in only; masks are stored in the parameter's own layout. This file is the one
place that knows the difference.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_MAPS = (nn.Linear, Conv1D)


def is_matrix(module: nn.Module) -> bool:
    """Whether `module` is one linear map with a two-dimensional weight."""
    return isinstance(module, LINEAR_MAPS)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of `module` is in x out."""
    return isinstance(module, Conv1D)


def as_out_in(module: nn.Module, tensor: Tensor) -> Tensor:
    """View `tensor`, laid out as the weight of `module`, as out x in; its own inverse."""
    return tensor.T if is_transposed(module) else tensor


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight of `module` as an out x in view without gradient; writing to it writes the parameter."""
    return as_out_in(module, module.get_parameter("weight").detach())
