"""Lightning strategies for several devices: ZeRO by DeepSpeed, FSDP2, and windows recovered in parallel."""

from recon.distributed.strategies.fsdp2 import FullyShardedStrategy
from recon.distributed.strategies.window_parallel import WindowParallelStrategy
from recon.distributed.strategies.zero import ZeroStrategy

__all__ = ["FullyShardedStrategy", "WindowParallelStrategy", "ZeroStrategy"]
