"""FSDP2: weights, gradients and optimizer state sharded over the processes by torch itself."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel
from typing_extensions import override

from recon.distributed.unpickling import unpickling_metadata_only


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all processes in one data-parallel group.

    With `bf16-mixed` weights are gathered in bf16, and gradients are reduced in fp32.

    Args:
        reduce_each_batch: Reduce the gradients of every accumulated batch. Otherwise the last batch of a step reduces
            their sum: less is sent, but until then each process holds the fp32 gradients of all weights that learn.
        **options: Of Lightning's ModelParallelStrategy.
    """

    strategy_name = "fsdp2"

    def __init__(self, reduce_each_batch: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.reduce_each_batch = reduce_each_batch

    @override
    def setup_environment(self) -> None:
        # Lightning's "auto" makes a node's devices a tensor-parallel group; their number is known only here.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, model: PreTrainedModel, blocks: Iterable[nn.Module]) -> None:
        """Shard `model` in place, block by block, so that one of `blocks` at a time is whole."""
        mesh = self.device_mesh["data_parallel"]
        half = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=None if half is None else torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        if self.reduce_each_batch:
            yield
            return
        assert self.lightning_module is not None
        sharded = [one for one in self.lightning_module.modules() if isinstance(one, FSDPModule)]
        for one in sharded:
            one.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for one in sharded:
                one.set_requires_gradient_sync(True, recurse=False)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with unpickling_metadata_only():
            return super().load_checkpoint(checkpoint_path, weights_only)
