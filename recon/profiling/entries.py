"""What an account of memory is made of: storages with a category and a side, what holds them, and peaks."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

Category = Literal["weights", "gradients", "optimizer", "activations", "calibration", "gram", "masks", "other"]
"""`activations` are kept for the backward pass, `calibration` are what enters and leaves windows, of all sequences."""

CATEGORIES: tuple[Category, ...] = get_args(Category)

Side = Literal["device", "host"]
"""Where bytes are:

- `device`: on the accelerator that computes. Without one, what would be on it if there were one;
- `host`: in the host's memory. Without an accelerator, what would stay there if there were one: it is *on the host*.
"""

SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Held:
    """What an object holds.

    Args:
        category: What it is.
        tensors: Nested in containers, or None.
        on_host: Whether it stays in the host's memory whatever computes.
    """

    category: Category
    tensors: Any
    on_host: bool = False


Holders = Mapping[type, Callable[[Any], Iterable[Held]]]
"""A class -> what one of its objects holds; objects whose `__init__` has not ended yet are asked, too."""


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
        """Where it is."""
        return "host" if self.on_host else "device"


@dataclass(frozen=True)
class Peak:
    """The most that was live on one side.

    Args:
        categories: Bytes of each category; together the tracked total.
        stage: What was going on, as whoever followed it called it.
        seconds: When, since the account was opened.
        operation: What allocated the last bytes; None if they were found.
    """

    categories: dict[Category, int]
    stage: str = ""
    seconds: float = 0.0
    operation: str | None = None

    @property
    def total(self) -> int:
        """Of all categories."""
        return sum(self.categories.values())
