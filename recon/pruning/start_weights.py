"""Start weights: other values for the surviving weights, from which recovery starts, in one file.

The file has one weight for every mask, in its parameter's layout, zero where pruned. It is written and read one weight
at a time, so that start weights as large as the model never lie in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.basics.files import Writer, atomic_write
from recon.distributed.parameters import whole
from recon.models.anatomy import Block
from recon.models.fewer_experts import route_among
from recon.models.offload.blocks import OffloadedBlocks
from recon.pruning.masks import Masks
from recon.pruning.removal import kept_in

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors calls them."""

Sink = Callable[[str, Tensor], None]
"""Receives the name of a parameter and its weight in the parameter's layout."""


class Start(Mapping[str, Tensor]):
    """Parameter name -> weight, on the CPU, read from the file at each access.

    Args:
        path: The file.
        masks: Names and shapes that the file must have.

    Raises:
        ValueError: If names or shapes in the file are not those of the masks.
    """

    def __init__(self, path: Path, masks: Masks) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
                self._shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
                dtypes = {name: one.get_dtype() for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"start weights need a whole safetensors file, got {path} ({error}); copy it again, or delete it and "
                f"prune again"
            ) from error
        if others := [name for name, dtype in dtypes.items() if dtype not in DTYPES.values()]:
            raise ValueError(
                f"start weights need one of {', '.join(DTYPES.values())}, got {dtypes[others[0]]} for `{others[0]}` in "
                f"{path}; prune again"
            )
        expected = dict(masks.shapes)
        if self._shapes != expected:
            differing = sorted(name for name in expected | self._shapes if self._shape(name) != expected.get(name))
            raise ValueError(
                f"start weights need the names and shapes of the masks, got {len(differing)} that differ in {path}, "
                f"the first `{differing[0]}`: {self._shape(differing[0])} there, {expected.get(differing[0])} among "
                f"the masks; use the file that was written with these masks, or prune again"
            )

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:  # an open file would keep its pages resident
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@contextmanager
def written(
    path: Path,
    like: Mapping[str, Tensor],
    writing: Writer = atomic_write,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Sink]:
    """Write start weights one by one, in any order; the file is whole when the context ends, or absent.

    `safetensors.torch.save_file` would need all weights at once.

    Args:
        path: The file.
        like: Parameter name -> a tensor of the shape and the dtype in which its weight is written.
        writing: Opens the file; `Manifest.writing` records it, too.
        metadata: Words that go into the file's header.

    Yields:
        A function that takes each weight; it raises ValueError if a weight is not finite in its dtype.
    """
    places, offset = {}, 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in like.items():
        end = offset + tensor.numel() * tensor.element_size()
        places[name] = offset
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed run; as large as the model
        stale.unlink()
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def write(name: str, weight: Tensor) -> None:
            weight = weight.detach().to("cpu", like[name].dtype).contiguous()
            assert weight.shape == like[name].shape, name
            if not weight.isfinite().all():
                raise ValueError(
                    f"start weights need to be finite in {weight.dtype}, got NaN or infinity in `{name}`; load the "
                    f"model in a wider model.dtype"
                )
            file.seek(8 + len(text) + places.pop(name))
            file.write(weight.view(-1).view(torch.uint8).numpy().data)

        yield write
        assert not places, f"no weight was given for {list(places)}"


@torch.no_grad()
def apply(model: nn.Module, masks: Masks, start: Mapping[str, Tensor] | None) -> None:
    """Zero the pruned weights of `model` in place and set the others to their values in `start`, if there is one.

    Mixtures that lose whole experts choose among the others from then on: see `route_among`. As `Masks.apply`, before
    FSDP2 shards the model or DeepSpeed copies it.

    Args:
        model: Has a parameter for every mask.
        masks: Which weights survive.
        start: Parameter name -> weight, for every mask; the survivors stay as they are if None.

    Raises:
        ValueError: If a weight of `start` is not zero where it is pruned.
    """
    if isinstance(model, PreTrainedModel) and (kept := kept_in(masks, model)):
        route_among(model, kept)
    if start is None:
        masks.apply(model)
        return
    masks.validate_for(model)
    for name in masks:
        weight = start[name]
        if masks.violations_of(name, weight):
            raise ValueError(
                f"start weights need to be zero where they are pruned, `{name}` is not; use the moved weights "
                f"that were written with these masks, or prune again"
            )
        with whole(model.get_parameter(name), write=True) as parameter:
            parameter.copy_(weight)


def amend_by(masks: Masks, start: Mapping[str, Tensor] | None, offloaded: OffloadedBlocks) -> Callable[[Block], None]:
    """Make the function for `OffloadedBlocks.amend` that prunes each block and sets its survivors to `start`."""

    def amend(block: Block) -> None:
        apply(offloaded.model, masks.subset(name for name in block.parameters() if name in masks), start)

    return amend
