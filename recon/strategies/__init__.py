"""Lightning strategies for several devices: ZeRO by DeepSpeed, FSDP2, and windows recovered in parallel."""

from recon.strategies.fully_sharded import FullyShardedStrategy
from recon.strategies.window_parallel import WindowParallelStrategy
from recon.strategies.zero import ZeroStrategy

__all__ = ["FullyShardedStrategy", "WindowParallelStrategy", "ZeroStrategy"]
