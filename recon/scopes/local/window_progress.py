"""The window under way: its epoch, its tokens and its held-out errors, which decide what it keeps."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recon.models.windows import Window

log = logging.getLogger("recon")


@dataclass
class WindowProgress:
    """The progress of a window.

    Args:
        window: The window.
        before: Held-out error of the weights that it began with.
        after: Held-out error at the end of the last epoch; NaN in the first one.
        epoch: Number of the epoch under way, from 1; 0 in front of the first.
        tokens: Tokens that went through the window in training.
    """

    window: Window
    before: float
    after: float = math.nan
    epoch: int = 0
    tokens: int = 0

    @property
    def is_worse(self) -> bool:
        """Whether the window is worse than it began, so that it keeps the weights that it began with."""
        return self.after > self.before

    @property
    def errors(self) -> dict[str, float]:
        """Held-out errors `before` and `after` of the weights that are kept; `discarded`, of those that are not."""
        if self.is_worse:
            return {"before": self.before, "after": self.before, "discarded": self.after}
        return {"before": self.before, "after": self.after}


def say_if_reset(window: Window, result: Mapping[str, Any]) -> None:
    """Log one line if the recovered weights of a window were discarded."""
    if "discarded" in result:
        log.warning(
            f"window {window.name} ended worse than it began, held-out error {result['before']:.4g} before and "
            f"{result['discarded']:.4g} after, and keeps the weights that it began with, for want of text or by "
            f"too high a learning rate"
        )
