"""The command line of recon as a comparison sees it, which writes commands and does not know how they are read."""

from abc import ABC, abstractmethod
from typing import Any

from recon.report.parts import Quantity


class Resolver(ABC):
    """Knows recon's command line, which a comparison writes without knowing how it is read.

    Attributes:
        on_gpu: Whether cells run on GPUs.
    """

    on_gpu: bool

    @abstractmethod
    def describe(self, kind: type, spec: dict[str, Any]) -> str:
        """The name of a criterion, refinement, pattern or allocation that a class specification makes."""

    @abstractmethod
    def resolved(self, command: list[str]) -> Any:
        """All options of a command, with what its configurations say, and the identity of its data, as JSON.

        Raises:
            ValueError: If the command cannot be understood.
        """

    @abstractmethod
    def cost(self, command: list[str], quantity: Quantity) -> float:
        """The planned cost of a command of `recon fit`.

        Args:
            command: The command.
            quantity: `tokens` that training steps see, `flops` of all processes, or `seconds`.
        """

    @abstractmethod
    def within(self, command: list[str], quantity: Quantity, limit: float) -> tuple[dict[str, int], float] | None:
        """The options by which a command of `recon fit` trains as long as a budget allows.

        Args:
            command: The command, with any length.
            quantity: See `cost`.
            limit: The budget.

        Returns:
            Dotted options and values, and what the command then needs; None if the shortest training needs more.

        Raises:
            ValueError: If the command has no length to choose.
        """
