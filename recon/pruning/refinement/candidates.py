"""The few weights of each row that are worth exchanging."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Pruned weights to keep and kept weights to prune.

    Args:
        pruned: P, indices of inputs, rows x a.
        kept: S, indices of inputs, rows x b.
        forbidden: Pairs that may not be exchanged: in different groups, or not a pruned and a kept weight.
        usable: Whether an index of P is pruned, and whether one of S is kept, rows x a+b.
    """

    pruned: Int[Tensor, "rows a"]
    kept: Int[Tensor, "rows b"]
    forbidden: Bool[Tensor, "rows a b"]
    usable: Bool[Tensor, "rows m"]

    @property
    def inputs(self) -> Int[Tensor, "rows m"]:
        """P, then S."""
        return torch.cat([self.pruned, self.kept], dim=1)


def in_rows(
    gain: Float[Tensor, "rows in_"], cost: Float[Tensor, "rows in_"], keep: Bool[Tensor, "rows in_"], num: int
) -> Candidates:
    """Choose the `num` pruned weights with the highest gains and the `num` kept ones with the lowest costs of each row.

    A row with fewer of either has other weights in their place, which are forbidden.
    """
    num = min(num, keep.shape[1])
    pruned = gain.masked_fill(keep, -torch.inf).topk(num, dim=1).indices
    kept = cost.masked_fill(~keep, torch.inf).topk(num, dim=1, largest=False).indices
    is_pruned, is_kept = ~keep.gather(1, pruned), keep.gather(1, kept)
    forbidden = ~(is_pruned[:, :, None] & is_kept[:, None])
    return Candidates(pruned, kept, forbidden, torch.cat([is_pruned, is_kept], dim=1))


def in_groups(
    gain: Float[Tensor, "rows in_"],
    cost: Float[Tensor, "rows in_"],
    keep: Bool[Tensor, "rows in_"],
    num: int,
    group: int,
) -> Candidates:
    """Choose all weights of the groups with the largest difference of highest gain and lowest cost.

    Args:
        gain: See `in_rows`.
        cost: See `in_rows`.
        keep: The mask, with the same number of survivors in every group.
        num: Number of weights to choose; one group at least.
        group: Number of consecutive inputs in a group.
    """
    rows, width = keep.shape
    survivors, num_groups = int(keep[0, :group].sum()), min(max(1, num // group), width // group)
    shape = rows, width // group, group
    promise = gain.masked_fill(keep, -torch.inf).view(shape).amax(2) - cost.masked_fill(~keep, torch.inf).view(
        shape
    ).amin(2)
    groups = promise.topk(num_groups, dim=1).indices
    # A stable sort has the pruned weights of a group first.
    members = keep.view(shape).byte().argsort(dim=2, stable=True)
    members = members.gather(1, groups[:, :, None].expand(-1, -1, group)) + group * groups[:, :, None]
    pruned, kept = members[:, :, : group - survivors], members[:, :, group - survivors :]
    place = torch.arange(num_groups, device=keep.device)
    apart = place.repeat_interleave(group - survivors)[:, None] != place.repeat_interleave(survivors)
    usable = torch.ones_like(members.flatten(1), dtype=torch.bool)
    return Candidates(pruned.flatten(1), kept.flatten(1), apart.expand(rows, -1, -1), usable)
