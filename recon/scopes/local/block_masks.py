"""The masks of the blocks that recovery has reached, and the weights that their survivors start from."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from recon.calibration.activations import Observation
from recon.calibration.statistics import InputStatistics
from recon.models.anatomy import Block
from recon.models.matrices import Matrix
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.start_weights import apply


class BlockMasks:
    """Chooses masks block by block, unless all were chosen before the fit, and prunes the model by them.

    Args:
        model: The model to prune.
        masks: Masks chosen so far; those chosen here are added in place.
        interleaved: Chooses the masks of a block; None if all were chosen before the fit.
        keeps_moved: Whether survivors start from the weights that the criterion of `interleaved` has moved.
        start_weights: Weights that all survivors start from; None if there are none, or if they are found block by
            block.

    Attributes:
        starts: Weights that survivors start from, by name, of blocks that are reached and not pruned yet.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        interleaved: Interleaved | None = None,
        keeps_moved: bool = False,
        start_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.masks, self.interleaved = model, masks, interleaved
        self.keeps_moved, self.start_weights = keeps_moved, start_weights
        self.starts: dict[str, Tensor] = {}

    def pruned(self) -> list[str]:
        """List the parameters that lose a weight, now or later."""
        if self.interleaved is not None:
            return self.interleaved.parameters
        return [name for name in self.masks if self.masks.subset([name]).num_pruned > 0]

    def observed(
        self, blocks: Sequence[Block], need: Observation, is_known: Callable[[str], bool]
    ) -> tuple[dict[str, Matrix], Observation]:
        """Say which matrices to observe as `blocks` are reached, and what of their inputs.

        Args:
            blocks: Blocks that are reached for the first time.
            need: Statistics that recovery needs.
            is_known: Whether recovery needs the inputs of a parameter's matrices that are known now.

        Returns:
            Name of the weight -> matrix, and the statistics that recovery and the criterion need together.
        """
        if self.interleaved is not None:
            prunable = self.interleaved.prunable
            matrices = {name: one for block in blocks for name, one in block.weights_among(prunable).items()}
            return matrices, _for_both(need, self.interleaved.criterion.needs)
        if need == "none":
            return {}, need
        matrices = {name: one for block in blocks for name, one in block.weights_among(self.masks).items()}
        return {name: one for name, one in matrices.items() if is_known(one.parameter_name)}, need

    def choose(self, blocks: Sequence[Block], statistics: Mapping[str, InputStatistics]) -> None:
        """Choose the masks of blocks, or read those that an interrupted run has chosen.

        Args:
            blocks: Blocks that are reached for the first time, still dense.
            statistics: Statistics of the inputs of their matrices; empty for blocks whose masks were chosen before.
        """
        if self.interleaved is None:
            return
        for block in blocks:
            masks, moved = self.interleaved.held(block), {}
            if masks is None or (self.keeps_moved and statistics):
                masks, moved = self.interleaved.prune(block, statistics)
            self.masks.add(masks)
            if self.keeps_moved:
                self.starts |= moved

    def take_starts(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Hand over the weights to start from that were found for these parameters."""
        return {name: self.starts.pop(name) for name in names if name in self.starts}

    def prune(self, names: Sequence[str]) -> None:
        """Prune these parameters and give their survivors the weights to start from."""
        start = self.starts if self.start_weights is None and self.starts else self.start_weights
        apply(self.model, self.masks.subset(names), start)
        for name in names:
            self.starts.pop(name, None)


def _for_both(recovery: Observation, criterion: Observation) -> Observation:
    """The statistics that suit both; the criterion's are those in full fp32, as where it prunes the whole model."""
    if recovery == "start gram" and criterion != "none":
        recovery = "gram"
    needs: tuple[Observation, ...] = (recovery, criterion)
    return max(needs, key=("none", "norms", "start gram", "gram", "cross").index)
