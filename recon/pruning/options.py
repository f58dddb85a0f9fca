"""The options of pruning beside criterion and pattern."""

from dataclasses import dataclass, field
from typing import Literal

from recon.models.experts import ExpertRows
from recon.pruning.allocation import Allocation
from recon.pruning.patterns import Pattern


@dataclass
class Pruning:
    """Options of pruning beside criterion and pattern.

    Args:
        exclude: Names of modules that stay dense; shell patterns such as `*.down_proj`.
        inputs: Source of a block's statistics: the outputs of the dense blocks before it ("dense"), of the pruned
            ones ("pruned") or of the recovered ones ("recovered"). With the first two all masks are chosen upfront;
            with the last the masks of a block are chosen when recovery gets there, which needs a local scope with
            model.propagation recovered or recovered_local.
        batch_size: Sequences per forward pass.
        experts: Rows for the statistics of a fused expert. They are for masks and exact starts; "routed" are the rows
            that the router sends to it, "all" those of its block, where an expert would have too few.
        allocation: Densities of the blocks; the pattern's everywhere if null. It is measured on the dense model,
            whatever `inputs` is.
    """

    exclude: list[str] = field(default_factory=list)
    inputs: Literal["dense", "pruned", "recovered"] = "dense"
    batch_size: int = 8
    experts: ExpertRows = "routed"
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"pruning.batch_size must be at least 1, got {self.batch_size}; 8 is the default")

    def describe(self, pattern: Pattern) -> str:
        """Name `pattern` for reports, with the allocation if there is one: `60% per row, owl`."""
        return str(pattern) if self.allocation is None else f"{pattern}, {self.allocation}"
