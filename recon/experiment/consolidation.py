"""The weights in a checkpoint of full retraining, whole, on the host: no process group, no GPU, no second copy."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from recon.distributed.parameters import FROZEN
from recon.distributed.unpickling import unpickling_metadata_only, unpickling_weights_only

PREFIX = "model."
"""Where a scope, the LightningModule that was saved, has its model."""


def consolidate(checkpoint: Path) -> dict[str, Tensor]:
    """Read the model's weights from a checkpoint of any strategy.

    Args:
        checkpoint: A file (one device, DDP), or the directory of DeepSpeed or of FSDP2.

    Returns:
        Name, as in the model's state dict, -> whole weight; under ZeRO the fp32 master copy of what was trained.
        What the file format allows to be mapped is read from the disk when it is used.

    Raises:
        ValueError: If it is no such checkpoint.
    """
    if checkpoint.is_file():
        state = load_file(checkpoint, ("state_dict",))["state_dict"]
    elif (checkpoint / "latest").is_file():
        state = _from_deepspeed(checkpoint)
    elif (checkpoint / ".metadata").is_file():
        state = _from_fsdp2(checkpoint)
    else:
        raise ValueError(
            f"a checkpoint needs to be a file, or a directory of DeepSpeed or FSDP2, got {checkpoint}; delete it to "
            f"begin anew"
        )
    return {name.removeprefix(PREFIX): weight for name, weight in state.items() if name.startswith(PREFIX)}


def load_file(checkpoint: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a checkpoint of one file, mapped into memory, without running code.

    Args:
        checkpoint: The file.
        keys: What it needs to have.

    Raises:
        ValueError: If it cannot be read, or lacks one of `keys`.
    """
    cure = f"delete {checkpoint.parent} to begin anew"
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = shorten(f"{error}", 200)
        raise ValueError(f"a checkpoint needs to be whole, got {checkpoint}, damaged ({reason}); {cure}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(
            f"a checkpoint needs {', '.join(keys)}, got {checkpoint} without {missing[0]}, made by another version of "
            f"recon or of Lightning; use that version, or {cure}"
        )
    return content


def require_weights(checkpoint: Path, held: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint without a weight, or with one of another shape.

    Args:
        checkpoint: Where the weights are from.
        held: Name -> weight in the checkpoint.
        needed: Name -> weight of the model.

    Raises:
        ValueError: Naming the first weight.
    """
    other = [name for name, weight in needed.items() if name not in held or held[name].shape != weight.shape]
    if other:
        got = list(held[other[0]].shape) if other[0] in held else "none"
        raise ValueError(
            f"a checkpoint needs the model's weights in their shapes, got {got} for {other[0]} "
            f"{list(needed[other[0]].shape)} in {checkpoint}; delete {checkpoint.parent} to begin anew"
        )


def _from_deepspeed(checkpoint: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    silence = StringIO()
    with unpickling_weights_only(), redirect_stdout(silence), redirect_stderr(silence):
        parts = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
        # That of rank 0, which alone has what was not trained; only stage 3 has one of each rank.
        held = torch.load(min(checkpoint.glob("checkpoint/*mp_rank_00_model_states.pt")), "cpu", mmap=True)
    assert parts is not None
    assert isinstance(held, dict)
    whole: dict[int, Tensor] = {}  # tied weights stay tied
    for part in parts.values():
        if id(part) not in whole:
            whole[id(part)] = part if isinstance(part, Tensor) else part.contiguous()
    frozen = {name: weight for name, weight in (held["module"] or {}).items() if name not in parts}  # by stage 1
    exact = {PREFIX + name: weight for name, weight in held[FROZEN].items()}  # DeepSpeed has them in 16 bits
    return {name: whole[id(part)] for name, part in parts.items()} | frozen | exact


def _from_fsdp2(checkpoint: Path) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    prefix = "state_dict."
    state: dict[str, Any] = {}
    with unpickling_metadata_only(), warnings.catch_warnings(action="ignore"):  # of one process: it is meant to be
        for name, entry in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(prefix): weight for name, weight in state.items()}
