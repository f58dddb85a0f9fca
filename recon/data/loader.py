"""A DataLoader that a resumed run enters where the killed one left it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A DataLoader that remembers, in its state dict, how many batches of the epoch it has given.

    Lightning saves and restores that state with a checkpoint. The batches before are drawn again and dropped:
    the tokens lie in memory.
    """

    given = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batches of an epoch; of the first one after `load_state_dict`, those that are left."""
        self.given, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self.given, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch were given."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out as many batches in the next epoch."""
        self._skip = state["given"] % len(self)
