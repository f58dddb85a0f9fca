"""Lightning callbacks of recon: masks kept, memory and throughput measured, progress told."""

from callbacks.mask_enforcer import MaskEnforcer
from callbacks.memory_profiler import MemoryProfiler
from callbacks.progress import Progress
from callbacks.throughput import Throughput

__all__ = ["MaskEnforcer", "MemoryProfiler", "Progress", "Throughput"]
