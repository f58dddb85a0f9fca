"""Parameters wherever a strategy keeps them: whole, partitioned by ZeRO-3, or sharded by FSDP2.

DeepSpeed trains an fp32 *master copy* beside the *working copy* that the forward pass reads, so a weight that
is to be zero has to be zero in both. What sees the whole of a parameter here is collective: every rank calls
it, for the same parameters in the same order, or all of them wait for ever.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recon.basics.mapped import mapped


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter; under ZeRO-3 the parameter itself shows [0]."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def whole(parameter: Tensor, write: bool = False) -> Iterator[Tensor]:
    """The working copy of the whole parameter, detached.

    Args:
        parameter: As `named_parameters` gives it.
        write: Keep what is written into it; under FSDP2 it cannot be written.
    """
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
            yield parameter.detach()
    elif isinstance(parameter, DTensor):
        assert not write, "weights are written before FSDP2 shards them"
        yield parameter.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        yield parameter.detach()


def master(parameter: Tensor) -> Tensor | None:
    """The whole fp32 master copy that DeepSpeed trains; None where the parameter itself is what is trained."""
    if not (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def copies(parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The whole of each copy of a parameter, by name."""
    with whole(parameter) as weight:
        yield "working copy", weight
    if (trained := master(parameter)) is not None:
        yield "fp32 master copy", trained


FROZEN = "frozen"
"""Key in a checkpoint: the weights that were not trained, if the strategy holds them rounded."""


def frozen_copies(model: nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
    """Copies in the host's memory of all parameters that do not learn; all ranks call this.

    Args:
        model: As the strategy keeps it, or before.
        dtype: Of the copies.
        keep: Whether this rank keeps them; the others return nothing.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with whole(parameter) as weight:
                if keep:
                    found[name] = weight.to("cpu", dtype, copy=True)
    return found


def round_working_copies(model: nn.Module, dtype: torch.dtype, exact: Collection[str] = ()) -> None:
    """Round all parameters but those named `exact` to the numbers of another precision; not under FSDP2."""
    for name, parameter in model.named_parameters():
        if name not in exact and parameter.dtype != dtype:
            with whole(parameter, write=True) as weight:
                weight.copy_(weight.to(dtype))


def gather(
    model: nn.Module, dtype: torch.dtype, directory: Path, keep: bool, exact: Collection[str] = ()
) -> dict[str, Tensor]:
    """The state dict of a sharded model: master copies where there are some, cast to `dtype`.

    Only one parameter is ever whole in memory: what is kept is mapped to a file without a name, which goes with
    the result, so that the host needs room for pages in use and not for the model.

    Args:
        model: As the strategy keeps it. Buffers and parameters count that its state dict has.
        dtype: Of floating-point entries.
        directory: Where that file lies, on a disk with room for the model.
        keep: Whether this rank keeps the result; the others return nothing.
        exact: Names of entries that keep their own dtype.
    """
    entries = model.state_dict()  # first: under FSDP2 this shards again what the last forward pass left whole
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    by_parameter: dict[int, Tensor] = {}  # tied parameters stay tied
    with TemporaryFile(dir=directory) as spill:  # the mappings keep its content
        for name, value in entries.items():
            parameter = parameters.get(name)
            if parameter is None:
                kept = value.detach().cpu()
            elif id(parameter) in by_parameter:
                kept = by_parameter[id(parameter)]
            else:
                last = list(copies(parameter))[-1][1]
                cast = last.is_floating_point() and name not in exact
                kept = spilled(last, dtype if cast else last.dtype, spill) if keep else last[:0]
                by_parameter[id(parameter)] = kept
            if keep:
                state[name] = kept
    return state


def spilled(value: Tensor, dtype: torch.dtype, file: IO[bytes]) -> Tensor:
    """A copy of `value` that lives at the end of `file`."""
    return mapped(file, value.shape, dtype).copy_(value)
