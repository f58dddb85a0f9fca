"""Peak memory of this process in bytes: resident on the host, allocated and reserved on a CUDA device."""

import ctypes
import gc
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peaks:
    """Peaks between `PeakMeter.start` and `stop`; None where there is no CUDA device."""

    host_bytes: int
    device_allocated_bytes: int | None
    device_reserved_bytes: int | None


class PeakMeter:
    """Measures the peaks of one stretch of work after another.

    Where the kernel lets a process reset its own high-water mark (Linux, `/proc/self/clear_refs`), the
    host peak is exact; elsewhere a thread samples the resident size every 5 ms. `method` says which.
    """

    def __init__(self) -> None:
        self.exact = _reset_high_water_mark()
        self._sampler: _Sampler | None = None

    @property
    def method(self) -> str:
        """The method of the host's peak, for reports."""
        return "VmHWM, reset per phase" if self.exact else "resident size sampled every 5 ms"

    def start(self) -> None:
        """Forget earlier peaks, and return free memory of the process to the system."""
        gc.collect()
        _trim_heap()
        if self.exact:
            _reset_high_water_mark()
        else:
            self._sampler = _Sampler()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def stop(self) -> Peaks:
        """Return the peaks since `start`."""
        host = _status_bytes("VmHWM") if self.exact else self._sampler.stop() if self._sampler else resident_bytes()
        if not torch.cuda.is_available():
            return Peaks(host, None, None)
        return Peaks(host, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    if STATUS.exists():
        return _status_bytes("VmRSS")
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the best that macOS tells without psutil
    return peak if sys.platform == "darwin" else peak * 1024


def _trim_heap() -> None:
    """Return freed memory to the system: glibc would keep it, and count it in the next phase's peak."""
    with suppress(AttributeError, OSError):  # another C library keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


class _Sampler:
    """A thread that samples the largest resident size."""

    def __init__(self) -> None:
        self._peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.is_set():
            self._peak = max(self._peak, resident_bytes())
            time.sleep(0.005)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, resident_bytes())
