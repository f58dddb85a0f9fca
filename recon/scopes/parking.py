"""Recovered weights that step aside, so that the other groups of matrices of their block get dense inputs."""

import torch
from torch import Tensor, nn

from recon.windows import Window


class Parking:
    """Holds the recovered weights of finished groups while the model has dense ones in their place.

    Args:
        model: Holds the windows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._dense: dict[str, Tensor] = {}
        self._parked: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._parked

    def keep_dense(self, window: Window) -> None:
        """Copy the weights of `window`, still dense."""
        self._dense = {name: self.model.get_parameter(name).detach().clone() for name in window.owned}

    @torch.no_grad()
    def park(self, window: Window) -> None:
        """Exchange the weights of `window` for the dense ones."""
        for name in window.owned:
            parameter = self.model.get_parameter(name)
            self._parked[name] = parameter.detach().clone()
            parameter.copy_(self._dense.pop(name))

    @torch.no_grad()
    def clear(self) -> None:
        """Give the model all recovered weights."""
        for name, weight in self._parked.items():
            self.model.get_parameter(name).copy_(weight)
        self._parked.clear()
