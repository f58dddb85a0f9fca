"""Equal budgets: the epochs or steps by which all recoveries of a group cost what one of them costs.

Costs are planned, before anything runs. Local scopes train whole epochs, so that they may leave a part of the budget;
reports say which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.resolver import Resolver
from recon.experiment.comparison.tuning import grid
from recon.report.parts import Quantity


@dataclass(frozen=True)
class Budgets:
    """The budget of a group.

    Args:
        quantity: What is held equal.
        reference: Title of the recovery whose own cost is the budget; the one that costs most if None.
        entries: All recoveries.
        command_of: Makes the command of a recovery from its entry and the options of a point of its grid.
        resolver: Plans commands.
    """

    quantity: Quantity
    reference: str | None
    entries: Sequence[Entry]
    command_of: Callable[[Entry, dict[str, Any]], list[str]]
    resolver: Resolver

    @cached_property
    def limit(self) -> tuple[float, str]:
        """The budget, and the title of the recovery that has it: of its grid the dearest point counts."""
        if self.reference is None:
            candidates = [entry for entry in self.entries if entry.matched]
        else:
            candidates = [entry for entry in self.entries if entry.title == self.reference]
        costs = [
            (self.resolver.cost(self.command_of(entry, point), self.quantity), entry.title)
            for entry in candidates
            for point in grid(entry.tune) or [{}]
        ]
        return max(costs, key=lambda one: one[0])

    def of(self, entry: Entry, chosen: dict[str, Any]) -> dict[str, Any]:
        """The budget of one recovery, as `Report.budget` has it.

        Args:
            entry: The recovery.
            chosen: The options of a point of its grid.

        Raises:
            ValueError: If its cost cannot be that of the reference.
        """
        limit, of = self.limit
        command = self.command_of(entry, chosen)
        told = {"quantity": self.quantity, "limit": limit, "of": of}
        if entry.title == of or not entry.matched:
            return {**told, "planned": self.resolver.cost(command, self.quantity), "options": {}}
        cure = f"give {entry.title!r} `matched: false` to show its cost as it is, or leave it out"
        try:
            found = self.resolver.within(command, self.quantity, limit)
        except ValueError as error:
            raise ValueError(f"match: {self.quantity} needs epochs or steps to choose: {error}; {cure}") from error
        if found is None:
            raise ValueError(
                f"match: {self.quantity} needs a budget for one epoch or step at least, got {limit:.3g}, that of "
                f"{of!r}; name a recovery that costs more as match_to, or {cure}"
            )
        options, planned = found
        return {**told, "planned": planned, "options": options}
