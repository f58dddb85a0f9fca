"""Tensors in nested containers.

Torch's pytree walks tuples, lists, dicts and every class that is registered with it, such as the outputs of
transformers' models. An object of any other class is a leaf and is left as it is.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def map_tensors(value: Any, convert: Callable[[Tensor], Any]) -> Any:
    """Return a copy of nested containers in which `convert` has replaced each tensor."""
    return tree_map_only(Tensor, convert, value)


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in nested containers, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
