"""Products with slices of three-dimensional parameters, observed wherever a model computes them.

A slice of a parameter shares its storage. So a product shows by storage, offset and strides of its factors which slice
of which parameter it multiplies with, and whether the parameter holds it as in x out. No module needs to be known.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PLAIN = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
"""Take both factors."""

ADDED = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}
"""Take a summand and both factors."""


@dataclass(frozen=True)
class Product:
    """One product of inputs with a slice.

    Args:
        name: Name of the parameter.
        index: Number of the slice.
        inputs: (..., in).
        is_transposed: Whether the parameter holds the slice as in x out.
        is_batched: Whether one operation multiplies all slices, each with as many rows: those that are not meant for a
            slice are zero.
    """

    name: str
    index: int
    inputs: Tensor
    is_transposed: bool
    is_batched: bool


class Products(TorchFunctionMode):
    """Shows the products with slices of some parameters that are computed within the context.

    Args:
        parameters: Name -> parameter of three dimensions.
        see: Is called with each product, before it is computed.
    """

    def __init__(self, parameters: Mapping[str, Tensor], see: Callable[[Product], None]) -> None:
        super().__init__()
        self._parameters, self._see = parameters, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the factors of products and compute."""
        for x, factor in factors(func, (*args, *(kwargs or {}).values())):
            for product in self._products(x, factor):
                self._see(product)
        return func(*args, **(kwargs or {}))

    def _products(self, x: Tensor, factor: Tensor) -> Iterator[Product]:
        """Yield the products of `x` with the slices that `factor`, in x out, consists of."""
        found = self._place(factor)
        if found is None:
            return
        name, first, is_transposed = found
        if factor.ndim == 2:
            yield Product(name, first, x, is_transposed, is_batched=False)
            return
        for offset, rows in enumerate(x.expand(len(factor), *x.shape[-2:])):
            yield Product(name, first + offset, rows, is_transposed, is_batched=True)

    def _place(self, factor: Tensor) -> tuple[str, int, bool] | None:
        """Find the parameter, the first slice and the layout of a factor; None if it is no slice."""
        storage = factor.untyped_storage()._cdata
        for name, parameter in self._parameters.items():
            if parameter.untyped_storage()._cdata != storage:
                continue
            index, rest = divmod(int(factor.storage_offset() - parameter.storage_offset()), int(parameter.stride(0)))
            if rest or (factor.ndim == 3 and factor.stride(0) != parameter.stride(0)):
                continue
            for is_transposed, view in ((True, parameter), (False, parameter.mT)):
                if factor.shape[-2:] == view.shape[-2:] and factor.stride()[-2:] == view.stride()[-2:]:
                    return name, index, is_transposed
        return None


def factors(func: Any, args: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs (..., in) and the factor (in, out) of a product, for each of its factors that may be a slice."""
    if func is F.linear:
        yield args[0], args[1].mT
        return
    factors = args[:2] if func in PLAIN else args[1:3] if func in ADDED else ()
    if len(factors) != 2 or not all(isinstance(one, Tensor) and one.ndim >= 2 for one in factors):
        return
    left, right = factors
    if right.ndim <= 3:
        yield left, right
    if left.ndim <= 3 and left.ndim == right.ndim:
        yield right.mT, left.mT
