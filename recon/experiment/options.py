"""The options of a run that neither scope, data nor trainer has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recon.distributed.part import Share
from recon.evaluation.tasks.suite import Suite
from recon.experiment.origin import Origin
from recon.pruning.criteria import Criterion
from recon.pruning.masks import Masks
from recon.pruning.patterns import Pattern
from recon.pruning.prune import Pruning


@dataclass(frozen=True)
class RunOptions:
    """How a model is pruned, which part of it is recovered, and what is measured.

    Args:
        criterion: How much a weight matters; None (with `pattern` None) trains a model that is not pruned.
        pattern: Which zeros are allowed.
        pruning: How the model is walked.
        masks: Masks chosen before, used instead of pruning: a file, or masks in memory.
        origin: A run from whose weights recovery starts, under its masks.
        baselines: Evaluate the dense and the pruned model too.
        evaluate_on: The split for perplexities; the report's protocol names it.
        drift: Measure how far the written model is from the dense one, which loads both at once; left out where
            nothing was pruned, and where the model is too large for one process and not offloaded.
        part: Recover these windows only, and end: nothing is saved or evaluated.
        merge: Train nothing: all windows have to be there.
        suite: The tasks that the written model, and with `baselines` the dense and the pruned one, are scored on.
        prediction: The predicted needs of the run, for the report.
    """

    criterion: Criterion | None = None
    pattern: Pattern | None = None
    pruning: Pruning = field(default_factory=Pruning)
    masks: Path | Masks | None = None
    origin: Origin | None = None
    baselines: bool = True
    evaluate_on: Literal["test", "validation"] = "test"
    drift: bool = True
    part: Share | None = None
    merge: bool = False
    suite: Suite = field(default_factory=Suite)
    prediction: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.criterion is None) != (self.pattern is None):
            got = f"--criterion {self.criterion} and --pattern {self.pattern}"
            raise ValueError(
                f"pruning needs both criterion and pattern, got {got}; give both, or null for both to train unpruned"
            )

    @property
    def prunes(self) -> bool:
        """Whether the model is pruned at all."""
        return self.criterion is not None

    @property
    def moves_weights(self) -> bool:
        """Whether the criterion moves the weights that survive."""
        return self.criterion is not None and self.criterion.moves_weights

    @property
    def interleaves(self) -> bool:
        """Whether masks are chosen block by block along with recovery."""
        return self.prunes and self.pruning.inputs == "recovered"
