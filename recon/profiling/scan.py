"""Search for live tensors among the objects of the garbage collector."""

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from recon.profiling.entries import Held, Holders
from recon.profiling.footprint import PARTITION


@dataclass
class Found:
    """Result of a scan.

    Args:
        parameters: All parameters.
        held: Tensors of the holders, weights and gradients first.
        tensors: All other tensors.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


class Scanner:
    """Searches all objects; each class is examined once.

    Args:
        holders: Class -> tensors of its objects, beside parameters with their weights and gradients.
    """

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._kinds: dict[type, Any] = {}  # a class -> Parameter, Tensor, how to ask its objects, or None
        self._frozen: list[weakref.ref[Any]] = []

    def scan(self) -> Found:
        """Find the tensors that are alive now."""
        found = Found()
        frozen = [(one, self._kinds[type(one)]) for ref in self._frozen if (one := ref()) is not None]
        for one, kind in (*self._interesting(), *frozen):
            if kind in (Tensor, nn.Parameter):
                # A sharded parameter is one by what it says of itself, not by its class.
                (found.parameters if isinstance(one, nn.Parameter) else found.tensors).append(one)
            else:
                found.held += kind(one)
        weights = [found.parameters, [getattr(one, PARTITION, None) for one in found.parameters]]
        gradients = [one.grad for one in found.parameters if one.is_leaf]
        found.held = [Held("weights", weights), Held("gradients", gradients), *found.held]
        return found

    def remember(self) -> None:
        """Note the holders that exist, before `gc.freeze` hides them from later scans."""
        self._frozen = [weakref.ref(one) for one, kind in self._interesting() if kind not in (Tensor, nn.Parameter)]

    def _interesting(self) -> list[tuple[Any, Any]]:
        """List the objects that are tensors or hold some, with their kind."""
        kinds, found = self._kinds, []
        for one in gc.get_objects():
            cls = type(one)
            kind = kinds[cls] if cls in kinds else self._kind_of(cls)
            if kind is not None:
                found.append((one, kind))
        return found

    def _kind_of(self, cls: type) -> Any:
        ask = next((self._holders[base] for base in cls.__mro__ if base in self._holders), None)
        kind = nn.Parameter if issubclass(cls, nn.Parameter) else Tensor if issubclass(cls, Tensor) else ask
        self._kinds[cls] = kind
        return kind
