"""Opening a model with its blocks on the host or on disk."""

from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from recon.basics.locks import locked
from recon.basics.manifest import Manifest
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.models.offload.blocks import OffloadedBlocks
from recon.models.offload.disk_weights import DiskWeights

Offload = Literal["none", "host", "disk"]
"""Place of a model that is pruned, recovered and measured block by block:

- `none`: on the device;
- `host`: in the host's memory; a block is on the device only while it is needed;
- `disk`: in its safetensors files; a block is read when it is needed, and dropped afterwards.
"""


def open_offloaded(
    source: ModelSource, offload: Offload, device: torch.device, dense: Path | None = None
) -> OffloadedBlocks:
    """Load a model with its blocks on the host or on disk.

    Args:
        source: The model.
        offload: Place of the blocks, `host` or `disk`.
        device: Device that blocks compute on.
        dense: Directory for the weights of a model that no files hold, if blocks are to be read from disk.

    Raises:
        ValueError: If there is no such model, or it cannot be read from disk block by block.
    """
    if offload == "host":
        return OffloadedBlocks(source.model(), device)
    if not source.is_stored:
        if dense is None:
            raise ValueError(
                "model.offload: disk writes a model without files to the run's directory first, got no directory; give "
                "one, or choose model.offload: host"
            )
        source = _written(source, dense)
    model, files = source.hollow(), source.files()
    disk_weights = DiskWeights(files, model)
    _fill(model, disk_weights)
    if (files / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(files)
    return OffloadedBlocks(model, device, disk_weights)


def onloaded(offloaded: OffloadedBlocks, source: ModelSource) -> PreTrainedModel:
    """Return a model that was offloaded whole, in the host's memory; it is offloaded no more.

    Args:
        offloaded: The model.
        source: Its source, from which it is loaded if its blocks are on disk.
    """
    if offloaded.disk_weights is not None:
        return source.model()
    offloaded.hold(())
    return offloaded.model


def _written(source: ModelSource, directory: Path) -> ModelSource:
    with locked(directory.with_name(f".{directory.name}.lock")):  # several jobs may begin one run at a time
        manifest = Manifest(directory.parent)
        if not manifest.is_intact(directory):
            with manifest.placing(directory) as temporary:
                source.model().save_pretrained(temporary)
    return source.at(directory)


@torch.no_grad()
def _fill(model: PreTrainedModel, disk_weights: DiskWeights) -> None:
    """Read all weights outside the blocks, and the stored buffers."""
    parameters = {name for block in Anatomy.of(model).blocks for name in block.parameters()}
    state = model.state_dict(keep_vars=True)
    names = [name for name in state if name in disk_weights and name not in parameters]
    for name, value in disk_weights.read(names):
        state[name].data = value.to(state[name].dtype, copy=True)
