"""Models whose blocks are not on the device: opened from their source, with their blocks on the host or on disk."""

import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from recon.basics.files import locked
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.models.offload.blocks import Residence
from recon.models.offload.disk_weights import Shards

Offload = Literal["none", "host", "disk"]
"""Where a model is that is recovered window by window:

- `none`: on the device;
- `host`: in the host's memory, blocks on the device only while they are needed;
- `disk`: blocks are read from the safetensors files of the model when they are needed, and forgotten afterwards.
"""


def open_offloaded(source: ModelSource, offload: Offload, device: torch.device, dense: Path | None = None) -> Residence:
    """Load a model with its blocks at home.

    Args:
        source: The model.
        offload: Where home is; not `none`.
        device: Where blocks are to compute.
        dense: Directory for the weights of a model that no files hold, if blocks are to be read from disk.

    Raises:
        ValueError: If there is no such model, or it cannot be read from disk block by block.
    """
    if offload == "host":
        return Residence(source.model(), device)
    if not source.is_stored:
        if dense is None:
            raise ValueError(
                "model.offload: disk writes a model without files to the run's directory first, got no directory; give "
                "one, or choose model.offload: host"
            )
        source = _written(source, dense)
    model, files = source.hollow(), source.files()
    shards = Shards(files, model)
    _fill(model, shards)
    if (files / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(files)
    return Residence(model, device, shards)


def _written(source: ModelSource, directory: Path) -> ModelSource:
    with locked(directory.with_name(f".{directory.name}.lock")):  # several jobs may begin one run at a time
        if not directory.exists():
            temporary = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            source.model().save_pretrained(temporary)
            temporary.rename(directory)
    return source.at(directory)


@torch.no_grad()
def _fill(model: PreTrainedModel, shards: Shards) -> None:
    """Read what lies outside the blocks, and buffers that are stored."""
    parameters = {name for block in Anatomy.of(model).blocks for name in block.parameters()}
    state = model.state_dict(keep_vars=True)
    for name, value in shards.read(name for name in state if name in shards and name not in parameters):
        state[name].data = value.to(state[name].dtype, copy=True)
