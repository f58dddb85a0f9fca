"""A model with shapes and without numbers, and training steps on it: what they allocate, keep and compute.

The model is transformers' own, made under torch's `FakeTensorMode`: operators propagate shapes, dtypes and devices,
take the kernels that real tensors would, autocast as those do, and allocate nothing. So no family has its own formula.
The meta device would not do: attention falls back to a kernel that keeps the scores there, and nothing is cast.
Blocks are run by `Replay`, whose check by numbers is left out. Equal blocks are rehearsed once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from recon.basics.trees import map_tensors, tensors_in
from recon.models.anatomy import Anatomy, Block
from recon.models.linear import weight_out_in
from recon.models.replay import Replay
from recon.models.windows import (
    BlockWindow,
    Window,
    block_windows,
    group_windows,
    submodule_windows,
)
from recon.planner.fake.step import Step, checkpointed, model_loss, take_step
from recon.planner.fake.tracker import Tracker
from recon.planner.options import Setting
from recon.planner.snapshot import numel
from recon.pruning.masks import Masks
from recon.scopes.lora import A, B, Lora, attach, merge
from recon.scopes.losses import window_loss
from recon.scopes.trainable import chosen

UNPACKED = "transformers.masking_utils.find_packed_sequence_indices"
"""Looks for packed sequences in the numbers of the positions, and builds a mask where it cannot: there are none."""


class Rehearsal:
    """A fake model and what steps on it take.

    Args:
        config: Of the model.
        dtype: Of its working weights.
        trust_remote_code: Run code that comes with the model.

    Attributes:
        model: Its parameters are fake tensors on the CPU.
        parameters: By name, tied ones once.
        num_parameters: Elements of all of them.
        anatomy: Its blocks.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        self._mode = FakeTensorMode()
        self._found: dict[Any, Any] = {}
        with self.faked():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
            self.model.config.use_cache = False
            self.model.requires_grad_(False)
            self.parameters = dict(self.model.named_parameters())
            self.anatomy = Anatomy.of(self.model)
            self.replay = Unverified(self.model, self.anatomy)
        self.dtype = dtype
        self.num_parameters = numel(self.parameters.values())

    @contextmanager
    def faked(self) -> Iterator[None]:
        """Tensors made inside have no numbers."""
        with self._mode, patch(UNPACKED, lambda position_ids: None):
            yield

    def windows(self, setting: Setting) -> Sequence[Window]:
        """The windows of a local scope, as its own code lays them out."""

        def lay_out() -> Sequence[Window]:
            if setting.scope == "matrix":
                return block_windows(self.anatomy, 1)
            if setting.scope == "block":
                return block_windows(self.anatomy, setting.num_blocks, setting.stride)
            if setting.groups is not None:
                return group_windows(self.replay, setting.groups)
            return submodule_windows(self.replay)

        with self.faked():
            key = "windows", setting.scope, setting.num_blocks, setting.stride, setting.groups
            return self._once(key, lay_out)

    def kind(self, window: Window, setting: Setting) -> tuple[Any, ...]:
        """Equal for windows whose steps take the same."""
        blocks = tuple(self.block_kind(block, setting) for block in window.blocks)
        offset = len(window.blocks[0].name)
        own = tuple(name[offset:] for name in window.owned) if len(blocks) == 1 else ()
        return type(window).__name__, blocks, own

    def block_kind(self, block: Block, setting: Setting) -> tuple[str, str]:
        """Equal for blocks that hold and are given the same."""

        def describe() -> tuple[str, str]:
            call = self.replay._calls_for(self._hidden(setting))[block.index]
            given = map_tensors((call.args, call.kwargs), lambda one: (list(one.shape), str(one.dtype)))
            return str(block.module), str(given)

        with self.faked():
            return self._once(("kind", block.index, setting.batch_size, setting.seq_len), describe)

    def given(self, setting: Setting) -> int:
        """Bytes of what the blocks are given beside hidden states, for the batch of this setting."""
        with self.faked():
            tensors = self._once(("given", setting.batch_size, setting.seq_len), lambda: self._given(setting))
            return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def buffer_bytes(self) -> int:
        """Of all buffers."""
        return sum(one.nbytes for one in self.model.buffers())

    def block_numel(self, block: Block) -> int:
        """Weights of a block."""
        return self._once(("numel", block.index), lambda: numel(block.parameters().values()))

    def block_buffers(self, block: Block) -> int:
        """Bytes of a block's buffers."""
        return self._once(("buffers", block.index), lambda: sum(one.nbytes for one in block.module.buffers()))

    def learning(self, names: Sequence[str], setting: Setting) -> dict[str, Tensor]:
        """What learns if some parameters are recovered: those of them that do, or adapters in their place."""
        if setting.parameters == "all":
            return {name: self.parameters[name] for name in names}
        if setting.parameters == "lora":
            return self._adapters(self.masked(names, setting), setting.lora_rank)
        found = chosen({name: self.parameters[name] for name in names}, self.prunable(), setting.parameters)
        return {name: self.parameters[name] for name in found}

    def masked(self, names: Sequence[str], setting: Setting) -> list[str]:
        """Those of some parameters whose masks are unpacked where they learn or are adapted."""
        if not setting.masked or setting.parameters == "vectors":
            return []
        pruned = self.prunable(setting.exclude)
        return [name for name in names if name in pruned]

    def adapter_bytes(self, names: Sequence[str], setting: Setting) -> int:
        """Of the adapters of some parameters; 0 if there are none."""
        return sum(one.nbytes for one in self.learning(names, setting).values()) * (setting.parameters == "lora")

    def _adapters(self, names: Sequence[str], rank: int) -> dict[str, Tensor]:
        """Tensors of the shapes that adapters of these matrices have."""

        def pair(name: str) -> dict[str, Tensor]:
            out, in_ = weight_out_in(self.prunable()[name]).shape
            path = name.removesuffix(".weight")
            return {f"{path}.{A}": torch.empty(rank, in_), f"{path}.{B}": torch.empty(out, rank)}

        with self.faked():
            pairs = [self._once(("adapters", name, rank), partial(pair, name)) for name in names]
        return {name: one for found in pairs for name, one in found.items()}

    def prunable(self, exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
        """Parameter name -> linear map that may be pruned."""
        return self._once(("prunable", tuple(exclude)), lambda: self.anatomy.prunable(exclude))

    def shape_of(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix, whatever its layout."""
        with self.faked():
            rows, width = weight_out_in(self.prunable()[name]).shape
            return rows, width

    def products(self, name: str) -> int:
        """Multiplications of a matrix with the Gram matrix of its inputs: rows times width squared."""
        rows, width = self._once(("shape", name), lambda: self.shape_of(name))
        return rows * width**2

    def inputs(self, block: Block, matrices: Sequence[str], setting: Setting) -> list[int]:
        """Width of every distinct input of some matrices of a block: as many Gram matrices are collected."""

        def watch() -> list[int]:
            seen: list[tuple[Tensor, int]] = []

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = (*args, *kwargs.values())[0]
                if not any(one is x for one, _ in seen):
                    seen.append((x, weight_out_in(module).shape[1]))

            handles = [
                block.matrices[name].register_forward_pre_hook(hook, with_kwargs=True)
                for name in block.matrices
                if f"{name}.weight" in matrices
            ]
            with torch.no_grad():
                self.replay.run(block.index, self._hidden(replace(setting, batch_size=1, seq_len=4)))
            for handle in handles:
                handle.remove()
            return [width for _, width in seen]

        own = tuple(name.removeprefix(block.name) for name in matrices)
        with self.faked():
            return self._once(("inputs", str(block.module), own), watch)

    def passed(self, block: Block, setting: Setting) -> Step:
        """One batch through a block, nothing trained; attention recorded if the scope does."""

        def run() -> Step:
            hidden = self._hidden(setting)
            with Tracker([*self.parameters.values(), hidden]) as tracker, torch.no_grad():
                output = (self.replay.run_and_tap if setting.taps else self.replay.run)(block.index, hidden)
                del output
            return Step(0, tracker.peak, Counter(), tracker.flops, tracker.flops)

        kind = self.block_kind(block, setting)
        with self.faked():
            return self._once(("passed", kind, setting.taps, *_sizes(setting)), run)

    def window(self, window: Window, setting: Setting, loaded: torch.dtype) -> Step:
        """A training step of a window, its optimizer having stepped before; inputs are loaded in another precision."""
        shape = setting.batch_size, setting.seq_len, self.dim
        target_shape = *shape[:2], self.features(window, setting)

        def output(batch: list[Tensor]) -> Tensor:  # a function, for what it casts goes when it returns
            return window.forward(self.replay, *(one.to(self.dtype) for one in batch)).float()

        def loss(batch: list[Tensor]) -> Tensor:
            batch += [torch.empty(target_shape, dtype=loaded), torch.empty(shape, dtype=loaded)]
            batch += [torch.empty(shape, dtype=loaded)] if window.takes_attention else []
            with self._casting(setting):
                return window_loss(output(batch[1:]), batch[0].float(), setting.loss)

        key = "window", self.kind(window, setting), setting.loss, loaded, *_sizes(setting)
        with self.faked():
            return self._once(key, lambda: self._step(window.owned, loss, setting, self._given(setting)))

    def features(self, window: Window, setting: Setting) -> int:
        """Width of what a window returns."""

        def run() -> int:
            hidden = self._hidden(replace(setting, batch_size=1, seq_len=4))
            with torch.no_grad():
                return window.forward(self.replay, hidden, hidden).shape[-1]

        if window.target != "recorded":
            return self.dim
        with self.faked():
            return self._once(("features", window.name), run)

    def block(self, block: Block, setting: Setting) -> Step:
        """What one more block adds to a training step of the whole model."""
        names = list(block.parameters())
        window = BlockWindow(block.name, [block], names, [])

        def loss(batch: list[Tensor]) -> Tensor:
            hidden = torch.empty((setting.batch_size, setting.seq_len, self.dim), dtype=self.dtype, requires_grad=True)
            forward = partial(window.forward, self.replay)
            with self._casting(setting):
                return (checkpointed(forward) if setting.gradient_checkpointing else forward)(hidden).sum()

        kind = self.block_kind(block, setting)
        with self.faked():
            key = "block", kind, setting.gradient_checkpointing, *_sizes(setting)
            return self._once(key, lambda: self._step(names, loss, setting, self._given(setting)))

    def head(self, setting: Setting) -> Step:
        """A training step of the model as if it had its first block only."""

        def loss(batch: list[Tensor]) -> Tensor:
            tokens = torch.zeros((setting.batch_size, setting.seq_len), dtype=torch.long)
            with self._casting(setting):
                return model_loss(lambda ids: self.model(input_ids=ids, use_cache=False).logits, tokens, setting.loss)

        def run() -> Step:
            first = self.anatomy.blocks[0]
            names = list(first.parameters())
            if setting.train == "all":
                names += [name for name in self.parameters if not self._in_blocks(name)]
            forward = first.module.forward
            try:
                if setting.gradient_checkpointing:
                    first.module.forward = checkpointed(forward)
                with only_first(self.model, first):
                    return self._step(names, loss, setting)
            finally:
                vars(first.module).pop("forward", None)

        with self.faked():
            key = "head", setting.loss, setting.train, setting.gradient_checkpointing, *_sizes(setting)
            return self._once(key, run)

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        with self.faked():
            return self._once("dim", lambda: self.replay.embed(torch.zeros((1, 4), dtype=torch.long)).shape[-1])

    def _in_blocks(self, name: str) -> bool:
        return any(name.startswith(f"{block.name}.") for block in self.anatomy.blocks)

    def _step(
        self,
        names: Sequence[str],
        loss_of: Callable[[list[Tensor]], Tensor],
        setting: Setting,
        known: Sequence[Tensor] = (),
    ) -> Step:
        known = [*self.parameters.values(), *known]
        masked = self.masked(names, setting)
        if setting.parameters != "lora":
            return take_step(self.learning(names, setting), masked, loss_of, setting.accumulate > 1, known)
        masks = Masks({name: torch.ones(self.parameters[name].shape, dtype=torch.bool) for name in masked})
        adapters = attach(self.model, masks, masked, Lora(setting.lora_rank), seed=0)
        try:
            learning = {name: self.model.get_parameter(name) for name in adapters}
            modules = [self.prunable()[name] for name in masked]
            known += [vars(module)["forward"].keep(torch.device("cpu")) for module in modules]
            return take_step(learning, (), loss_of, setting.accumulate > 1, known)
        finally:
            merge(self.model, adapters)

    def _given(self, setting: Setting) -> list[Tensor]:
        return tensors_in([(call.args, call.kwargs) for call in self.replay._calls_for(self._hidden(setting))])

    def _hidden(self, setting: Setting) -> Tensor:
        return torch.empty((setting.batch_size, setting.seq_len, self.dim), dtype=self.dtype)

    def _casting(self, setting: Setting) -> torch.autocast:
        return torch.autocast("cpu", dtype=setting.half, enabled=setting.autocasts)

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


@contextmanager
def only_first(model: PreTrainedModel, first: Block) -> Iterator[None]:
    """Within, the model has its first block and no others."""
    parent, _, name = first.name.rpartition(".")[0].rpartition(".")
    owner = model.get_submodule(parent)
    blocks = getattr(owner, name)
    try:
        setattr(owner, name, nn.ModuleList([first.module]))
        yield
    finally:
        setattr(owner, name, blocks)


class Unverified(Replay):
    """Replay without its check, for there are no numbers to compare, that looks at one of several equal blocks."""

    def verify(self) -> None:
        """Nothing: `recon fit` verifies the real model."""
        self._like: dict[str, tuple[set[str], set[str]]] = {}  # dependencies, under names within the block

    def dependencies(self, index: int) -> tuple[set[str], set[str]]:
        """As `Replay.dependencies`."""
        block = self.anatomy.blocks[index]
        kind, prefix = str(block.module), len(block.name)
        if kind not in self._like:
            attention, mlp = super().dependencies(index)
            self._like[kind] = {name[prefix:] for name in attention}, {name[prefix:] for name in mlp}
        attention, mlp = self._like[kind]
        return {block.name + name for name in attention}, {block.name + name for name in mlp}


def _sizes(setting: Setting) -> tuple[Any, ...]:
    learns = setting.parameters, setting.lora_rank, setting.masked, setting.exclude, setting.accumulate > 1
    return setting.batch_size, setting.seq_len, setting.precision, setting.autocasts, *learns
