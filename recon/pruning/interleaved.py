"""Interleaved pruning: the masks of a block are chosen when recovery gets there.

Its statistics come from the outputs of the recovered blocks before it, which pruning upfront cannot have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from recon.basics.manifest import Manifest
from recon.calibration.statistics import InputStatistics
from recon.models.anatomy import Block
from recon.models.matrices import Matrix, parameters_of
from recon.profiling.ledger import followed
from recon.pruning.criteria import Criterion
from recon.pruning.masks import Masks
from recon.pruning.patterns import Pattern
from recon.pruning.prune import prune_block
from recon.pruning.recorded_pattern import recorded


@dataclass(frozen=True)
class Interleaved:
    """Pruning of the blocks by a local scope on its way.

    Args:
        criterion: The measure of importance.
        patterns: The pattern of each block.
        prunable: Name of the weight -> matrix, over all blocks.
        directory: Directory of the run, for the masks of each block, so that a killed run can resume; None writes none.
    """

    criterion: Criterion
    patterns: Sequence[Pattern]
    prunable: Mapping[str, Matrix]
    directory: Path | None = None

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that get a mask."""
        return list(parameters_of(self.prunable.values()))

    def held(self, block: Block) -> Masks | None:
        """Load the masks of a block that were chosen before; None if there are none."""
        path = self._path(block)
        return Masks.load(path) if path is not None and self._manifest.is_intact(path) else None

    def prune(self, block: Block, statistics: Mapping[str, InputStatistics]) -> tuple[Masks, dict[str, Tensor]]:
        """Choose the survivors of a dense block, with their moved weights if the criterion moves them."""
        matrices = block.weights_among(self.prunable)
        found = {name: statistics[name] for name in matrices}
        with followed("choose masks"):
            keep, moved = prune_block(matrices, found, self.criterion, self.patterns[block.index])
        masks = Masks(keep)
        path = self._path(block)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            pattern = self.patterns[block.index]
            rule = recorded(pattern, self.prunable.values())
            made_by = {"criterion": str(self.criterion), "pattern": str(pattern), **rule}
            masks.save(path, made_by, self._manifest.writing)
        return masks, moved

    @property
    def _manifest(self) -> Manifest:
        assert self.directory is not None
        return Manifest(self.directory.parent)

    def _path(self, block: Block) -> Path | None:
        return self.directory and self.directory / f"{block.index:03d}.safetensors"
