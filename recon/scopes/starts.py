"""The weights that recovery starts from, where they come from outside the scope: a criterion or another run."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.distributed.parameters import whole
from recon.models.anatomy import Anatomy
from recon.models.offload.blocks import OffloadedBlocks

StartName = Literal["pruned", "moved", "exact", "auto", "run"]

NO_MOVED = (
    "model.start: moved needs weights that the criterion moved, {}; choose a criterion that moves weights "
    "(SparseGPT, ADMM, ALPS), or --masks of one that `recon prune` wrote, or model.start: exact"
)

NO_RUN = "model.start: run starts from the weights of a finished run, got none; name it: --from runs/x"


def given_start(start: StartName, given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """The weights to start from, if they are given to the scope; None if it finds them itself.

    Raises:
        ValueError: If there are none and the start needs them.
    """
    if start not in ("moved", "run"):
        return None
    if given is None:
        raise ValueError(NO_RUN if start == "run" else NO_MOVED.format("there are none with these masks"))
    return given


@torch.no_grad()
def carry_over(model: PreTrainedModel, names: Iterable[str], start: Mapping[str, Tensor]) -> None:
    """Set parameters that have no mask, such as norms, to their values in the run that recovery starts from.

    Args:
        model: Its weights may be partitioned; then all ranks call this.
        names: The parameters.
        start: Parameter name -> weight.
    """
    for name in names:
        with whole(model.get_parameter(name), write=True) as parameter:
            parameter.copy_(start[name])


def require_dense_elsewhere(
    model: PreTrainedModel,
    offloaded: OffloadedBlocks | None,
    carried: Collection[str],
    start: Mapping[str, Tensor],
    scope: str,
) -> None:
    """Refuse a run that has changed parameters which the scope leaves as they are in the dense model.

    Args:
        model: The dense model.
        offloaded: Its blocks, if they are not on the device.
        carried: Names of the parameters that the scope takes from the run.
        start: Parameter name -> weight in the run.
        scope: Name of the scope, for the message.

    Raises:
        ValueError: Naming the first such parameter.
    """
    in_block = {name: block.index for block in Anatomy.of(model).blocks for name in block.parameters()}
    for name, parameter in model.named_parameters():
        if name in carried:
            continue
        if offloaded is not None and name in in_block:
            offloaded.onload(in_block[name])
        theirs = start[name]
        if not torch.equal(parameter.detach().to("cpu", theirs.dtype), theirs):
            raise ValueError(
                f"the {scope} scope leaves {name} as it is in the dense model, got --from a run that has changed it; "
                f"choose scopes/full, or a run that has trained "
                f"{'pruned matrices alone (model.parameters: weights)' if name in in_block else 'blocks alone'}"
            )
