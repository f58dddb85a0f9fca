"""The zeros of a model, in its pruned matrices and in all parameters, and its size on disk, as reports have them."""

from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from recon.models.loading import ModelSource
from recon.models.offload.blocks import OffloadedBlocks
from recon.models.stored import share_of_zeros, size_on_disk, stored_weights


def sparsities(parameters: Iterable[tuple[str, Tensor]], matrices: Container[str]) -> dict[str, Any]:
    """`sparsity` and `model_sparsity` of a model, 0 to 1.

    Args:
        parameters: Names and parameters, tied ones once, as `named_parameters` yields them.
        matrices: Names of those that are pruned.
    """
    zeros, sizes = {True: 0, False: 0}, {True: 0, False: 0}
    for name, parameter in parameters:
        sizes[name in matrices] += parameter.numel()
        zeros[name in matrices] += parameter.numel() - int(parameter.count_nonzero())
    whole = sum(zeros.values()) / max(1, sum(sizes.values()))
    return {"sparsity": zeros[True] / max(1, sizes[True]), "model_sparsity": whole}


def offloaded_parameters(offloaded: OffloadedBlocks) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of a model whose blocks are on the host or on disk; each block is loaded in its turn."""
    inside = set()
    for block in offloaded.anatomy.blocks:
        offloaded.onload(block.index)
        inside |= block.parameters().keys()
        yield from block.parameters().items()
    yield from ((name, one) for name, one in offloaded.model.named_parameters() if name not in inside)


def source_size(source: ModelSource) -> dict[str, Any]:
    """`disk_bytes` of a model; None if it has no files."""
    return {"disk_bytes": size_on_disk(source.files()) if source.is_stored else None}


def written_sizes(directory: Path) -> dict[str, Any]:
    """`model_sparsity` and `disk_bytes` of a model that was written."""
    return {"model_sparsity": share_of_zeros(stored_weights(directory)), "disk_bytes": size_on_disk(directory)}
