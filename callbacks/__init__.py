"""Lightning callbacks of recon: masks kept, memory measured, progress told."""

from callbacks.mask_enforcer import MaskEnforcer
from callbacks.memory_profiler import MemoryProfiler
from callbacks.progress import Progress

__all__ = ["MaskEnforcer", "MemoryProfiler", "Progress"]
