"""The cost of a recovery, over all starts of its run."""

import time
from typing import Any

from recon.distributed import ranks

TALLY = "tally"
"""Key in a checkpoint: the cost so far."""


class Tally:
    """Tokens and seconds that went into a recovery, those of earlier starts included.

    Attributes:
        at_least: Whether seconds are missing: an earlier start ended without a record of its last ones.
    """

    def __init__(self) -> None:
        self.at_least = False
        self._earlier_tokens = self._tokens = self._since_step = 0
        self._earlier_seconds = 0.0
        self._started: float | None = None

    def go_on(self, seconds: float, tokens: int = 0, at_least: bool = False) -> None:
        """Add up from what earlier starts have recorded, in all processes."""
        self._earlier_seconds, self._earlier_tokens = seconds, tokens
        self.at_least = self.at_least or at_least

    def start(self) -> None:
        """Let the time of this start run."""
        self._started = time.monotonic()

    def count(self, tokens: int) -> None:
        """Note the tokens of a batch of this process that goes through a training step."""
        self._since_step += tokens

    def step(self) -> None:
        """Note an optimizer step: a run that goes on does not give its batches again."""
        self._tokens, self._since_step = self._tokens + self._since_step, 0

    @property
    def seconds(self) -> float:
        """Wall time of all starts so far, as this process has it."""
        return self._earlier_seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def tokens(self) -> int:
        """Tokens of all processes, in all starts; each process has to call this."""
        return self._earlier_tokens + sum(ranks.gathered(self._tokens + self._since_step))

    def state(self) -> dict[str, Any]:
        """What `go_on` takes, as of the last optimizer step; each process has to call this."""
        tokens = self._earlier_tokens + sum(ranks.gathered(self._tokens))
        return {"seconds": self.seconds, "tokens": tokens, "at_least": self.at_least}
