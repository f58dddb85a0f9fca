"""The blocks of an offloaded model: on the host or on disk, and on the device while they are needed.

A parameter stays one object all the time. Only its data moves, so hooks, names and optimizers keep hold of it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.basics.trees import map_tensors
from recon.distributed.parameters import spilled
from recon.models.anatomy import Anatomy, Block
from recon.models.offload.disk_weights import DiskWeights
from recon.models.offload.transfers import Onloaded, Pinned, copy_to_host
from recon.profiling.ledger import claim

HOST = torch.device("cpu")


class OffloadedBlocks:
    """Moves the blocks of a model to the device and back.

    Blocks that are *held* stay on the device; beside them at most one other is there. All else (embeddings, head) is
    on the host, except within `rest_onloaded`.

    Where device and host are one, the same copies are made: `device_bytes` counts what a device would have to hold. Of
    a block that is offloaded, only the weights that changed are copied back.

    Args:
        model: Has its blocks on the host, or without data if there are `disk_weights`.
        device: Device that blocks compute on.
        disk_weights: Files that the weights of blocks are read from and never written back to. None if the blocks are
            in the host's memory.
        amend: Is called with each block that was onloaded, and may change its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        disk_weights: DiskWeights | None = None,
        amend: Callable[[Block], None] = lambda block: None,
    ) -> None:
        self.model, self.anatomy, self.device = model, Anatomy.of(model), device
        self.disk_weights, self.amend = disk_weights, amend
        self._held: set[int] = set()
        self._onloaded: dict[int, list[Onloaded]] = {}
        self._rest: list[Onloaded] = []
        self._pinned: Pinned | None = None

    def device_bytes(self) -> int:
        """Count the bytes of the weights and buffers on the device, or those that a device would hold."""
        blocks = [_tensors(self.anatomy.blocks[index].module) for index in self._onloaded]
        return sum(tensor.nbytes for tensors in [*blocks, [one.tensor for one in self._rest]] for tensor in tensors)

    def host_copies(self) -> list[Tensor]:
        """List the weights and buffers on the host, for the memory ledger; none before `__init__` has ended."""
        if "_rest" not in vars(self):
            return []
        there = [*self._rest, *(one for block in self._onloaded.values() for one in block)]
        on_device = {id(one.tensor) for one in there}
        return [one for one in _tensors(self.model) if id(one) not in on_device] + [one.host_copy for one in there]

    def move_to(self, device: torch.device) -> None:
        """Compute on `device` from now on; if it is another one, all blocks are offloaded first."""
        if device != self.device:
            self.hold(())
            self.device = device

    def hold(self, indices: Iterable[int]) -> None:
        """Onload these blocks and offload all others."""
        self.keep(indices)
        for index in sorted(self._held - self._onloaded.keys()):
            self._copy_to_device(index)

    def keep(self, indices: Iterable[int]) -> None:
        """Offload all other blocks; these stay on the device once they are onloaded."""
        self._held = set(indices)
        self._offload_all_but(self._held)

    def onload(self, index: int) -> None:
        """Onload one more block, in place of the last one that is not held."""
        if index not in self._onloaded:
            self._offload_all_but(self._held)
            self._copy_to_device(index)

    @contextmanager
    def onloaded_when_called(self) -> Iterator[None]:
        """Make the whole model runnable within the context: each block is onloaded when it is called."""
        blocks = self.anatomy.blocks

        def before(block: Block) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                self.onload(block.index)
                return moved(args, self.device), moved(kwargs, self.device)

            return hook

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.module.register_forward_pre_hook(before(block), with_kwargs=True).remove)
            # The first hook to run: other hooks, too, find the output on the host, where the head is.
            handle = blocks[-1].module.register_forward_hook(lambda module, args, out: moved(out, HOST), prepend=True)
            stack.callback(handle.remove)
            yield

    @contextmanager
    def rest_onloaded(self) -> Iterator[None]:
        """Keep the embeddings, the head and all else outside the blocks on the device within the context."""
        inside = {id(tensor) for block in self.anatomy.blocks for tensor in _tensors(block.module)}
        self._rest = self._copied([one for one in _tensors(self.model) if id(one) not in inside])
        try:
            yield
        finally:
            _restore(self._rest)
            self._rest = []

    def state(self, dtype: torch.dtype | None, directory: Path) -> dict[str, Tensor]:
        """Return the amended state dict, mapped to an unnamed file that is deleted with the result.

        Args:
            dtype: Dtype of floating-point entries; their own if None.
            directory: Directory of that file, on a disk with room for the model.
        """
        self.hold(())
        entries = self.model.state_dict(keep_vars=True)
        in_block = {name: block.index for block in self.anatomy.blocks for name in block.parameters()}
        state: dict[str, Tensor] = {}
        by_tensor: dict[int, Tensor] = {}  # tied ones stay tied
        with TemporaryFile(dir=directory) as file:
            for name, tensor in entries.items():
                if name in in_block:
                    self.onload(in_block[name])
                if id(tensor) not in by_tensor:
                    value = tensor.detach()
                    kept = dtype if dtype and value.is_floating_point() else value.dtype
                    by_tensor[id(tensor)] = spilled(value, kept, file)
                state[name] = by_tensor[id(tensor)]
        self.hold(())
        return state

    def _copy_to_device(self, index: int) -> None:
        block = self.anatomy.blocks[index]
        if self.disk_weights is None:
            self._onloaded[index] = self._copied(_tensors(block.module), index)
        else:
            parameters = {f"{block.name}.{name}": one for name, one in block.module.named_parameters()}
            self._onloaded[index] = self._copied(list(block.module.buffers()))
            self._onloaded[index] += [Onloaded(parameter, parameter.data) for parameter in parameters.values()]
            for name, value in self.disk_weights.read(parameters):
                claim("weights", value, on_host=True)
                parameters[name].data = value.to(self.device, parameters[name].dtype, copy=True)
            claim("weights", *parameters.values())
        self.amend(block)
        for one in self._onloaded[index]:
            one.note()  # what was amended will be again

    def _offload_all_but(self, kept: set[int]) -> None:
        for index in [index for index in self._onloaded if index not in kept]:
            block = self._onloaded.pop(index)
            if self.disk_weights is None:
                copy_to_host([one for one in block if one.has_changed], self.device)
            _restore(block)

    def _copied(self, tensors: list[Tensor], index: int | None = None) -> list[Onloaded]:
        """Copy the data of tensors to the device, for those of a block ahead of time; the host's copies stay."""
        sources, copies = [tensor.data for tensor in tensors], [tensor.data for tensor in tensors]
        if self.device.type == "cuda" and index is not None:
            sources = self._pinned_copies(index, tensors)
        for tensor, source in zip(tensors, sources, strict=True):
            tensor.data = source.to(self.device, copy=True, non_blocking=True)
        claim("weights", *tensors)
        return [Onloaded(*pair) for pair in zip(tensors, copies, strict=True)]

    def _pinned_copies(self, index: int, tensors: list[Tensor]) -> list[Tensor]:
        """Take the pinned copy of a block, and begin with that of the next."""
        if self._pinned is None:
            self._pinned = Pinned()
        copies, following = self._pinned.take(index, tensors), index + 1
        if following < len(self.anatomy.blocks) and following not in self._onloaded:
            self._pinned.begin(following, _tensors(self.anatomy.blocks[following].module))
        return copies


def moved(value: Any, device: torch.device) -> Any:
    """Return nested containers with all their tensors on `device`."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _restore(onloaded: list[Onloaded]) -> None:
    for one in onloaded:
        one.restore()
