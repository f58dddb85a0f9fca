"""A fake model, with shapes and without numbers: the memory and the FLOPs of training steps on it.

The model is transformers' own, made under torch's `FakeTensorMode`: operators propagate shapes, dtypes and devices,
take the kernels of real tensors, autocast as those do, and allocate nothing. So no family has its own formula. The
meta device would not do: attention falls back to a kernel that keeps the scores there, and nothing is cast. `Replay`
runs the blocks, without its check by numbers. Of equal blocks one is run.
"""

import math
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
from recon.models.matrices import Matrix, parameters_of
from recon.models.windows import (
    BlockWindow,
    Window,
    block_windows,
    group_windows,
    submodule_windows,
)
from recon.planner.fake.replay import Unverified
from recon.planner.fake.step import Input, Step, checkpointed, take_step
from recon.planner.fake.tracker import Tracker
from recon.planner.options import PlanOptions
from recon.planner.snapshot import numel
from recon.pruning.masks import Masks
from recon.scopes.lora import A, B, Lora, attach, merge
from recon.scopes.losses import window_loss
from recon.scopes.model_loss import chunk_rows, logits_bytes, model_loss
from recon.scopes.trainable import chosen

UNPACKED = "transformers.masking_utils.find_packed_sequence_indices"
"""Searches the positions for packed sequences, and builds a mask where it cannot: fake positions have no numbers."""

GROUPED = "transformers.integrations.moe._can_use_grouped_mm"
"""Chooses torch's kernel for fused experts, which refuses fp32 on fake tensors; transformers' operator takes all."""


class FakeModel:
    """A fake model and the steps on it; each kind of step is taken once.

    Args:
        config: Configuration of the model.
        dtype: Precision of the working weights.
        trust_remote_code: Run code that comes with the model.

    Attributes:
        model: The model; its parameters are fake tensors on the CPU.
        parameters: Name -> parameter, tied ones once.
        num_parameters: Elements of all parameters.
        anatomy: The blocks of the model.
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
        """Make all new tensors inside fake ones."""
        with self._mode, patch(UNPACKED, lambda position_ids: None), patch(GROUPED, lambda *_: False):
            yield

    def windows(self, options: PlanOptions) -> Sequence[Window]:
        """Lay out the windows of a local scope, by the scope's own code."""

        def lay_out() -> Sequence[Window]:
            if options.scope == "matrix":
                return block_windows(self.anatomy, 1)
            if options.scope == "block":
                return block_windows(self.anatomy, options.num_blocks, options.stride)
            if options.groups is not None:
                return group_windows(self.replay, options.groups)
            return submodule_windows(self.replay)

        with self.faked():
            key = "windows", options.scope, options.num_blocks, options.stride, options.groups
            return self._once(key, lay_out)

    def kind(self, window: Window, options: PlanOptions) -> tuple[Any, ...]:
        """Return a key that is equal for windows with equal steps."""
        blocks = tuple(self.block_kind(block, options) for block in window.blocks)
        offset = len(window.blocks[0].name)
        own = tuple(name[offset:] for name in window.owned) if len(blocks) == 1 else ()
        return type(window).__name__, blocks, own

    def block_kind(self, block: Block, options: PlanOptions) -> tuple[str, str]:
        """Return a key that is equal for blocks with equal modules and inputs."""

        def describe() -> tuple[str, str]:
            call = self.replay._calls_for(self._hidden(options))[block.index]
            given = map_tensors((call.args, call.kwargs), lambda one: (list(one.shape), str(one.dtype)))
            return str(block.module), str(given)

        with self.faked():
            return self._once(("kind", block.index, options.batch_size, options.seq_len), describe)

    def given(self, options: PlanOptions) -> int:
        """Bytes of the blocks' inputs beside hidden states, for one batch."""
        with self.faked():
            tensors = self._once(("given", options.batch_size, options.seq_len), lambda: self._given(options))
            return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(one.nbytes for one in self.model.buffers())

    def block_numel(self, block: Block) -> int:
        """Count the weights of a block."""
        return self._once(("numel", block.index), lambda: numel(block.parameters().values()))

    def block_buffers(self, block: Block) -> int:
        """Bytes of a block's buffers."""
        return self._once(("buffers", block.index), lambda: sum(one.nbytes for one in block.module.buffers()))

    def learning(self, names: Sequence[str], options: PlanOptions) -> dict[str, Tensor]:
        """Select the tensors that learn if `names` are recovered: some of these, or adapters in their place."""
        if options.parameters == "all":
            return {name: self.parameters[name] for name in names}
        if options.parameters == "lora":
            return self._adapters(self.masked(names, options), options.lora_rank)
        found = chosen({name: self.parameters[name] for name in names}, self.anatomy.blocks, options.parameters)
        return {name: self.parameters[name] for name in found}

    def masked(self, names: Sequence[str], options: PlanOptions) -> list[str]:
        """Select the parameters whose masks are unpacked because they learn or have adapters."""
        if not options.masked or options.parameters == "vectors":
            return []
        pruned = self._once(("masked", options.exclude), lambda: parameters_of(self.prunable(options.exclude).values()))
        return [name for name in names if name in pruned]

    def adapter_bytes(self, names: Sequence[str], options: PlanOptions) -> int:
        """Bytes of the adapters of some parameters; 0 without adapters."""
        return sum(one.nbytes for one in self.learning(names, options).values()) * (options.parameters == "lora")

    def _adapters(self, names: Sequence[str], rank: int) -> dict[str, Tensor]:
        """Make tensors with the shapes of these matrices' adapters."""

        def pair(name: str) -> dict[str, Tensor]:
            out, in_ = self.prunable()[name].shape
            path = name.removesuffix(".weight")
            return {f"{path}.{A}": torch.empty(rank, in_), f"{path}.{B}": torch.empty(out, rank)}

        with self.faked():
            pairs = [self._once(("adapters", name, rank), partial(pair, name)) for name in names]
        return {name: one for found in pairs for name, one in found.items()}

    def prunable(self, exclude: Sequence[str] = ()) -> dict[str, Matrix]:
        """Name of the weight -> prunable matrix."""
        return self._once(("prunable", tuple(exclude)), lambda: self.anatomy.prunable(exclude))

    def products(self, name: str) -> int:
        """Count the multiplications of a matrix with the Gram matrix of its inputs: rows times width squared."""
        rows, width = self.prunable()[name].shape
        return rows * width**2

    def inputs(self, block: Block, matrices: Sequence[str], options: PlanOptions) -> list[Input]:
        """List every distinct input of some matrices of a block: each has its Gram matrix, as each slice has."""
        chosen = list(block.weights_among(frozenset(matrices)).values())

        def watch() -> list[Input]:
            seen: list[tuple[Tensor, Input]] = []

            def see(matrix: Matrix, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = (*args, *kwargs.values())[0]
                if not any(one is x for one, _ in seen):
                    seen.append((x, Input(matrix.shape[1], 1.0)))

            handles = [
                one.module.register_forward_pre_hook(partial(see, one), with_kwargs=True)
                for one in chosen
                if one.index is None
            ]
            with torch.no_grad():
                self.replay.run(block.index, self._hidden(replace(options, batch_size=1, seq_len=4)))
            for handle in handles:
                handle.remove()
            slices = [Input(one.shape[1], one.rows_per_token) for one in chosen if one.index is not None]
            return [one for _, one in seen] + slices

        own = tuple(name.removeprefix(block.name) for name in matrices)
        with self.faked():
            return self._once(("inputs", str(block.module), own), watch)

    def passed(self, block: Block, options: PlanOptions) -> Step:
        """Pass one batch through a block without training; attention is recorded if the scope records it."""

        def run() -> Step:
            hidden = self._hidden(options)
            with Tracker([*self.parameters.values(), hidden]) as tracker, torch.no_grad():
                taps = options.taps and block.mixer is not None
                output = (self.replay.run_and_tap if taps else self.replay.run)(block.index, hidden)
                del output
            return Step(0, tracker.peak, Counter(), tracker.flops, tracker.flops)

        kind = self.block_kind(block, options)
        with self.faked():
            return self._once(("passed", kind, options.taps, *_sizes(options)), run)

    def window(self, window: Window, options: PlanOptions, loaded: torch.dtype) -> Step:
        """Take a training step of a window whose optimizer has stepped before.

        Args:
            window: The window.
            options: The options of the run.
            loaded: Precision in which inputs and target are loaded.
        """
        shape = options.batch_size, options.seq_len, self.dim
        target_shape = *shape[:2], self.features(window, options)

        def output(batch: list[Tensor]) -> Tensor:  # a function: its casts are freed when it returns
            return window.forward(self.replay, *(one.to(self.dtype) for one in batch)).float()

        def loss(batch: list[Tensor]) -> Tensor:
            batch += [torch.empty(target_shape, dtype=loaded), torch.empty(shape, dtype=loaded)]
            batch += [torch.empty(shape, dtype=loaded)] if window.takes_attention else []
            with self._casting(options):
                return window_loss(output(batch[1:]), batch[0].float(), options.loss)

        key = "window", self.kind(window, options), options.loss, loaded, *_sizes(options)
        with self.faked():
            return self._once(key, lambda: self._step(window.owned, loss, options, self._given(options)))

    def features(self, window: Window, options: PlanOptions) -> int:
        """Return the width of a window's output."""

        def run() -> int:
            hidden = self._hidden(replace(options, batch_size=1, seq_len=4))
            with torch.no_grad():
                return window.forward(self.replay, hidden, hidden).shape[-1]

        if window.target != "recorded":
            return self.dim
        with self.faked():
            return self._once(("features", window.name), run)

    def block(self, block: Block, options: PlanOptions) -> Step:
        """Take the part that one more block adds to a training step of the whole model."""
        names = list(block.parameters())
        window = BlockWindow(block.name, [block], names, [])

        def loss(batch: list[Tensor]) -> Tensor:
            hidden = torch.empty((options.batch_size, options.seq_len, self.dim), dtype=self.dtype, requires_grad=True)
            forward = partial(window.forward, self.replay)
            with self._casting(options):
                return (checkpointed(forward) if options.gradient_checkpointing else forward)(hidden).sum()

        kind = self.block_kind(block, options)
        with self.faked():
            key = "block", kind, options.gradient_checkpointing, *_sizes(options)
            return self._once(key, lambda: self._step(names, loss, options, self._given(options)))

    def head(self, options: PlanOptions) -> Step:
        """Take a training step of the model with its first block only."""

        def loss(_: list[Tensor], rows: int | None) -> Tensor:
            tokens = torch.zeros((options.batch_size, options.seq_len), dtype=torch.long)
            with self._casting(options):  # the model is its own teacher
                return model_loss(self.model, tokens, options.loss, self.model, rows=rows)  # pyright: ignore[reportArgumentType]

        def run() -> Step:
            first = self.anatomy.blocks[0]
            names = list(first.parameters())
            if options.train == "all":
                names += [name for name in self.parameters if not self._in_blocks(name)]
            forward = first.module.forward
            try:
                if options.gradient_checkpointing:
                    first.module.forward = checkpointed(forward)
                with only_first(self.model, first):
                    rows = self.chunk_rows(options)
                    step = self._step(names, partial(loss, rows=rows), options)
                    # Chunks compute gradients beside the loss, which held-out batches do not.
                    return step if rows is None else replace(step, forward_flops=self._forward_flops(loss, rows))
            finally:
                vars(first.module).pop("forward", None)

        with self.faked():
            key = "head", options.loss, options.train, options.gradient_checkpointing, options.logits_memory
            return self._once((*key, *_sizes(options)), run)

    def chunk_rows(self, options: PlanOptions) -> int | None:
        """Count the predictions whose logits exist at a time, as full retraining does; None for all."""
        if logits_bytes(self.model, options.batch_size, options.seq_len) <= options.logits_memory:
            return None

        def find() -> int | None:
            with only_first(self.model, self.anatomy.blocks[0]):
                return chunk_rows([self.model], options.logits_memory, torch.device("cpu"), _same_storage)

        with self.faked():
            return self._once(("rows", options.logits_memory), find)

    def _forward_flops(self, loss: Callable[[list[Tensor], int], Tensor], rows: int) -> int:
        with Tracker(self.parameters.values()) as tracker, torch.no_grad():
            loss([], rows)
        return tracker.flops

    @property
    def dim(self) -> int:
        """The width of the hidden states."""
        with self.faked():
            return self._once("dim", lambda: self.replay.embed(torch.zeros((1, 4), dtype=torch.long)).shape[-1])

    def _in_blocks(self, name: str) -> bool:
        return any(name.startswith(f"{block.name}.") for block in self.anatomy.blocks)

    def _step(
        self,
        names: Sequence[str],
        loss_of: Callable[[list[Tensor]], Tensor],
        options: PlanOptions,
        known: Sequence[Tensor] = (),
    ) -> Step:
        known = [*self.parameters.values(), *known]
        masked = self.masked(names, options)
        if options.parameters != "lora":
            return take_step(self.learning(names, options), masked, loss_of, options.accumulate > 1, known)
        shapes = {name: tuple(self.parameters[name].shape) for name in masked}
        bits = {name: torch.empty(-(-math.prod(shape) // 8), dtype=torch.uint8) for name, shape in shapes.items()}
        masks = Masks.of_packed(bits, shapes)
        adapters = attach(self.model, masks, masked, Lora(options.lora_rank), seed=0)
        try:
            learning = {name: self.model.get_parameter(name) for name in adapters}
            modules = [self.prunable()[name].module for name in masked]
            known += [vars(module)["forward"].keep(torch.device("cpu")) for module in modules]
            return take_step(learning, (), loss_of, options.accumulate > 1, known)
        finally:
            merge(self.model, adapters)

    def _given(self, options: PlanOptions) -> list[Tensor]:
        return tensors_in([(call.args, call.kwargs) for call in self.replay._calls_for(self._hidden(options))])

    def _hidden(self, options: PlanOptions) -> Tensor:
        return torch.empty((options.batch_size, options.seq_len, self.dim), dtype=self.dtype)

    def _casting(self, options: PlanOptions) -> torch.autocast:
        return torch.autocast("cpu", dtype=options.half, enabled=options.autocasts)

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


@contextmanager
def only_first(model: PreTrainedModel, first: Block) -> Iterator[None]:
    """Remove all blocks but the first from the model inside."""
    parent, _, name = first.name.rpartition(".")[0].rpartition(".")
    owner = model.get_submodule(parent)
    blocks = getattr(owner, name)
    try:
        setattr(owner, name, nn.ModuleList([first.module]))
        yield
    finally:
        setattr(owner, name, blocks)


def _sizes(options: PlanOptions) -> tuple[Any, ...]:
    learns = options.parameters, options.lora_rank, options.masked, options.exclude, options.accumulate > 1
    return options.batch_size, options.seq_len, options.precision, options.autocasts, *learns


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
