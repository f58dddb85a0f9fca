"""The losses of steps, left on the device until somebody looks: to ask for each would make the host wait each time."""

import torch
from torch import Tensor

from recon.scopes.losses import check_finite


class StepLosses:
    """Losses that nobody has looked at yet.

    Attributes:
        latest: Loss of the last step under its name, where it was computed; none before the first.
    """

    def __init__(self) -> None:
        self.latest: dict[str, Tensor] = {}
        self._noted: list[tuple[Tensor, str]] = []

    def note(self, name: str, loss: Tensor, where: str) -> None:
        """Note a loss, and of what it is the loss."""
        self.latest = {name: loss.detach()}
        self._noted.append((loss.detach(), where))

    def finite(self) -> Tensor:
        """Return the losses since the last call, on the host, [num_steps].

        Raises:
            FloatingPointError: If one is NaN or infinite, naming the first.
        """
        noted, self._noted = self._noted, []
        losses = torch.stack([loss for loss, _ in noted]).cpu() if noted else torch.empty(0)
        for loss, (_, where) in zip(losses, noted, strict=True):
            check_finite(loss, where)
        return losses
