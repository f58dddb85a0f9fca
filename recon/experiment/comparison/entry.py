"""One recovery of a comparison."""

from dataclasses import dataclass, field
from typing import Any

from recon.report import SCOPES

RECOVERIES = SCOPES[3:]
"""The scopes of recovery."""


@dataclass
class Entry:
    """One recovery to compare.

    Args:
        scope: What reports call it: matrix, submodule, block or full.
        config: Configurations merged in order, such as `[scopes/full, strategies/zero2]`.
        options: Dotted options of `recon fit`, such as `model.lr: 5.0e-4`.
        label: How tables call it; the scope decides if not given.
        tune: Values to try for dotted options of `recon fit`, such as `model.lr: [1.0e-3, 2.0e-3]`; the grid is
            their product. The point with the lowest perplexity on the validation split is used, the first of several.
        matched: Whether its epochs or steps follow from the budget where a comparison has `match`; false for one whose
            cost is as it is, such as the matrix scope, and is shown.

    Raises:
        ValueError: If the scope is unknown, or an option to tune has no values, or has one in `options` as well.
    """

    scope: str
    config: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    tune: dict[str, list[Any]] = field(default_factory=dict)
    matched: bool = True

    def __post_init__(self) -> None:
        if self.scope not in RECOVERIES:
            raise ValueError(
                f"recoveries: scope needs one of {', '.join(RECOVERIES)}, got {self.scope!r}; name it by its label"
            )
        self.config = self.config or [f"scopes/{self.scope}"]
        for name, values in self.tune.items():
            if not values:
                raise ValueError(f"tune needs at least one value of {name} to try, got none for {self.title!r}")
            if name in self.options:
                raise ValueError(f"an option is either given or tuned, got both for {name} of {self.title!r}; drop one")

    @property
    def title(self) -> str:
        """What progress lines call it."""
        return self.label or self.scope
