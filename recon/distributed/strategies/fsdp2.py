"""FSDP2: weights, gradients and optimizer state sharded over the processes by torch itself."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from typing_extensions import override

from recon.distributed.unpickling import unpickling_metadata_only


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all processes in one data-parallel group."""

    strategy_name = "fsdp2"

    @override
    def setup_environment(self) -> None:
        # Lightning's "auto" makes a node's devices a tensor-parallel group; their number is known only here.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, model: PreTrainedModel, blocks: Iterable[nn.Module]) -> None:
        """Shard `model` in place, block by block, so that one of `blocks` at a time is whole."""
        mesh = self.device_mesh["data_parallel"]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with unpickling_metadata_only():
            return super().load_checkpoint(checkpoint_path, weights_only)
