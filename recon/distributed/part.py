"""Which of a model's windows one of several processes recovers, where windows do not depend on each other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One of `of` consecutive shares of a sequence, whose sizes differ by one at most; the earlier are the smaller.

    The later a share, the further its process walks through the dense model before its first window begins. That
    walk takes one forward pass, where an epoch of a window takes a forward and a backward pass of that window, and
    is not evened out.

    Args:
        index: Which share, from 0.
        of: How many shares there are.
    """

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """The share that `3/16` names, the third of sixteen.

        Raises:
            ValueError: If `text` names none.
        """
        numbers = re.fullmatch(r"(\d+)/(\d+)", text)
        if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
            raise ValueError(
                f"--windows needs one part of several, from 1/16 to 16/16 if there are 16, got {text!r}; give its "
                f"number, a slash and how many parts there are"
            )
        return cls(int(numbers[1]) - 1, int(numbers[2]))

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.of}"

    def select(self, items: Sequence[T]) -> Sequence[T]:
        """Its items; none if there are fewer items than shares and this is one that goes without."""
        return items[len(items) * self.index // self.of : len(items) * (self.index + 1) // self.of]
