"""Workers: how many cells run at a time, and the device and threads of each."""

import os
from typing import Literal

import torch

from recon.basics.refusals import UsageError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that bound a process's threads."""

DEVICES = "CUDA_VISIBLE_DEVICES"


def workers_of(number: int | Literal["gpus"], threads: int | None = None) -> list[dict[str, str]]:
    """The environment variables that a cell gets from its worker, one mapping per worker.

    Args:
        number: Of workers; `gpus` for one on each visible CUDA device.
        threads: Of each cell. If None, several workers share the cores evenly, unless the environment has a bound;
            one worker keeps all of them.

    Raises:
        UsageError: If a number is below 1, or there is no CUDA device.
    """
    if number != "gpus" and number < 1:
        raise UsageError(f"--workers must be at least 1, or gpus or slurm, got {number}; 1 is the default")
    require_threads(threads)
    workers = [{DEVICES: name} for name in _devices()] if number == "gpus" else [{} for _ in range(number)]
    if threads is None and len(workers) > 1 and not any(name in os.environ for name in THREADS):
        threads = max(1, _num_cores() // len(workers))
    bound = {} if threads is None else threads_of(threads)
    return [worker | bound for worker in workers]


def require_threads(number: int | None) -> None:
    """Refuse a number of threads below 1.

    Raises:
        UsageError: If it is.
    """
    if number is not None and number < 1:
        raise UsageError(f"--threads must be at least 1, got {number}; leave it out to share the cores evenly")


def threads_of(number: int) -> dict[str, str]:
    """The environment variables that bound a process to a number of threads."""
    return dict.fromkeys(THREADS, str(number))


def _devices() -> list[str]:
    """The visible CUDA devices, by the names that the environment has for them.

    Raises:
        UsageError: If there is none.
    """
    num, named = torch.cuda.device_count(), os.environ.get(DEVICES)
    if num == 0:
        reason = f"{DEVICES} is {named!r}" if named is not None else "torch sees no CUDA device here"
        raise UsageError(f"--workers gpus needs at least one visible GPU, got none ({reason}); give a number instead")
    return [str(index) for index in range(num)] if named is None else named.split(",")[:num]


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
