"""Where the blocks of a model are: at home, on the host or on disk, and for a while on the device that computes.

A parameter is one object all the time. What moves is its data, so hooks, names and optimizers keep hold of it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.distributed.parameters import spilled
from recon.models.anatomy import Anatomy, Block
from recon.models.offload.disk_weights import Shards
from recon.profiling.ledger import claim

HOST = torch.device("cpu")

Moved = list[tuple[Tensor, Tensor]]
"""Tensors of a module, each with its data at home."""


class Residence:
    """Brings blocks to the device and sends them home.

    Blocks that are *held* stay until others are; besides them at most one *visits*. What lies outside the blocks
    (embeddings, head) is on the host, unless `around` brings it.

    Where device and host are one, the same copies are made: `device_bytes` counts what a device would have to hold.

    Args:
        model: Its blocks at home: on the host, or without data if there are `shards`.
        device: Where blocks compute.
        shards: Where the weights of blocks are read from; they are never written back. None if they live on the host.
        amend: Is told each block when it arrives, and may change its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        shards: Shards | None = None,
        amend: Callable[[Block], None] = lambda block: None,
    ) -> None:
        self.model, self.anatomy, self.device = model, Anatomy.of(model), device
        self.shards, self.amend = shards, amend
        self._held: set[int] = set()
        self._present: dict[int, Moved] = {}
        self._outside: Moved = []

    def device_bytes(self) -> int:
        """Bytes of the weights and buffers that are on the device, or would be if there were one."""
        blocks = [_tensors(self.anatomy.blocks[index].module) for index in self._present]
        return sum(tensor.nbytes for tensors in [*blocks, [one for one, _ in self._outside]] for tensor in tensors)

    def at_home(self) -> list[Tensor]:
        """Weights and buffers that are there, for an account of memory; none before `__init__` has ended."""
        if "_outside" not in vars(self):
            return []
        pairs = [*self._outside, *(pair for moved in self._present.values() for pair in moved)]
        away = {id(tensor) for tensor, _ in pairs}
        return [one for one in _tensors(self.model) if id(one) not in away] + [home for _, home in pairs]

    def move_to(self, device: torch.device) -> None:
        """Compute there from now on; all blocks are sent home if that is elsewhere."""
        if device != self.device:
            self.hold(())
            self.device = device

    def hold(self, indices: Iterable[int]) -> None:
        """Have these blocks on the device and no others."""
        self.keep(indices)
        for index in sorted(self._held - self._present.keys()):
            self._bring(index)

    def keep(self, indices: Iterable[int]) -> None:
        """Send all other blocks home; these are brought as they are visited, and stay."""
        self._held = set(indices)
        self._send_home(self._held)

    def visit(self, index: int) -> None:
        """Have one more block on the device, in place of the last one that was visiting."""
        if index not in self._present:
            self._send_home(self._held)
            self._bring(index)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within, the whole model runs: each block visits the device when it is called."""
        blocks = self.anatomy.blocks

        def arrive(block: Block) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                self.visit(block.index)
                return moved(args, self.device), moved(kwargs, self.device)

            return hook

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.module.register_forward_pre_hook(arrive(block), with_kwargs=True).remove)
            # The first to see it: what other hooks collect is where the head is, too.
            handle = blocks[-1].module.register_forward_hook(lambda module, args, out: moved(out, HOST), prepend=True)
            stack.callback(handle.remove)
            yield

    @contextmanager
    def around(self) -> Iterator[None]:
        """Within, what lies outside the blocks is on the device."""
        inside = {id(tensor) for block in self.anatomy.blocks for tensor in _tensors(block.module)}
        self._outside = _move([one for one in _tensors(self.model) if id(one) not in inside], self.device)
        try:
            yield
        finally:
            _restore(self._outside)
            self._outside = []

    def state(self, dtype: torch.dtype | None, directory: Path) -> dict[str, Tensor]:
        """The state dict of a model that is on disk, mapped to a file without a name that goes with the result.

        Args:
            dtype: Of floating-point entries; their own if None.
            directory: Where that file lies, on a disk with room for the model.
        """
        assert self.shards is not None
        self.hold(())
        entries = self.model.state_dict(keep_vars=True)
        in_block = {name: block.index for block in self.anatomy.blocks for name in block.parameters()}
        state: dict[str, Tensor] = {}
        by_tensor: dict[int, Tensor] = {}  # tied ones stay tied
        with TemporaryFile(dir=directory) as file:
            for name, tensor in entries.items():
                if name in in_block:
                    self.visit(in_block[name])
                if id(tensor) not in by_tensor:
                    value = tensor.detach()
                    kept = dtype if dtype and value.is_floating_point() else value.dtype
                    by_tensor[id(tensor)] = spilled(value, kept, file)
                state[name] = by_tensor[id(tensor)]
        self.hold(())
        return state

    def _bring(self, index: int) -> None:
        block = self.anatomy.blocks[index]
        if self.shards is None:
            self._present[index] = _move(_tensors(block.module), self.device)
        else:
            parameters = {f"{block.name}.{name}": one for name, one in block.module.named_parameters()}
            self._present[index] = _move(list(block.module.buffers()), self.device)
            self._present[index] += [(parameter, parameter.data) for parameter in parameters.values()]
            for name, value in self.shards.read(parameters):
                claim("weights", value, at_home=True)
                parameters[name].data = value.to(self.device, parameters[name].dtype, copy=True)
            claim("weights", *parameters.values())
        self.amend(block)

    def _send_home(self, but: set[int]) -> None:
        for index in [index for index in self._present if index not in but]:
            pairs = self._present.pop(index)
            if self.shards is None:
                for tensor, home in pairs:
                    home.copy_(tensor.data)
            _restore(pairs)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it, at any depth of tuples, lists and dicts, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    return value


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _move(tensors: list[Tensor], device: torch.device) -> Moved:
    pairs = [(tensor, tensor.data) for tensor in tensors]
    for tensor, home in pairs:
        tensor.data = home.to(device, copy=True)
    claim("weights", *tensors)
    return pairs


def _restore(pairs: Moved) -> None:
    for tensor, home in pairs:
        tensor.data = home
