"""Lightning strategies for full retraining on several devices: ZeRO by DeepSpeed, and FSDP2."""

from recon.strategies.fully_sharded import FullyShardedStrategy
from recon.strategies.zero import ZeroStrategy

__all__ = ["FullyShardedStrategy", "ZeroStrategy"]
