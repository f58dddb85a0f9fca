"""Parts of an account of memory: storages with a category and a side, their holders, and peaks."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

Category = Literal["weights", "gradients", "optimizer", "activations", "calibration", "gram", "masks", "other"]
"""`activations` are kept for the backward pass; `calibration` are hidden states of all sequences."""

CATEGORIES: tuple[Category, ...] = get_args(Category)

Side = Literal["device", "host"]
"""Place of bytes:

- `device`: the accelerator that computes. Without one, tensors count that would be on it;
- `host`: the host's memory. Without an accelerator, tensors count that would stay there: they are *on the host*.
"""

SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Held:
    """Tensors of one object.

    Args:
        category: Their category.
        tensors: The tensors, nested in containers, or None.
        on_host: Whether they stay in the host's memory, with an accelerator too.
    """

    category: Category
    tensors: Any
    on_host: bool = False


Holders = Mapping[type, Callable[[Any], Iterable[Held]]]
"""Class -> the tensors of one of its objects, also of an object whose `__init__` has not ended yet."""


@dataclass(eq=False, slots=True)
class Entry:
    """One storage, from its birth to its death."""

    nbytes: int
    on_host: bool
    category: Category | None
    stage: str
    seconds: float
    operation: Any
    module: weakref.ref[nn.Module] | None
    counted: bool = False  # in the sums

    @property
    def side(self) -> Side:
        """The place of the storage."""
        return "host" if self.on_host else "device"


@dataclass(frozen=True)
class Peak:
    """The most that was live on one side.

    Args:
        categories: Bytes of each category; together the tracked total.
        stage: Name of the current step of work.
        seconds: Time since the account was opened.
        operation: The operation that allocated the last bytes; None if a scan found them.
    """

    categories: dict[Category, int]
    stage: str = ""
    seconds: float = 0.0
    operation: str | None = None

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.categories.values())
