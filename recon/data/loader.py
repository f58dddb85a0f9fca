"""A DataLoader that continues, in a resumed run, at the batch where the killed one stopped."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A DataLoader whose state dict counts the batches given in this epoch.

    Lightning saves and restores that state with a checkpoint. A resumed epoch draws the earlier batches again and
    drops them, which costs little: the tokens lie in memory.
    """

    given = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batches of an epoch; after `load_state_dict`, the remaining batches of that epoch."""
        self.given, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self.given, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches given in this epoch."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip that number of batches in the next epoch."""
        self._skip = state["given"] % len(self)
