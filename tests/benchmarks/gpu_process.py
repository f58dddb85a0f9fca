"""A measurement in a process of its own, with a limit: it can hang, crash or fill the device, and the next one begins.

Processes are forked from one that has imported the libraries, where CUDA allows that: it does if no import has touched
the device.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

LIMIT_OF_PROBE = 120.0
"""Seconds to import the libraries once and to touch the device."""


GOODBYE = 5.0
"""Seconds for a process to end after its result."""


class Stopped(Exception):
    """A measurement ran into its limit."""


class Died(Exception):
    """The process of a measurement ended without a result."""


def context(device: str, preload: str) -> BaseContext:
    """Choose how processes are started.

    Args:
        device: `cpu` or `cuda`.
        preload: Module to import once.

    Raises:
        Died: If a process cannot compute on the device, however it is started.
    """
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([preload])
    if _computes(forked, device):
        return forked
    fresh = multiprocessing.get_context("spawn")
    if _computes(fresh, device):
        return fresh
    raise Died(f"a process of its own cannot compute on {device}")


def _computes(where: BaseContext, device: str) -> bool:
    try:
        return run(where, touch, (device,), LIMIT_OF_PROBE, Path(os.devnull)) == 1.0
    except (Stopped, Died):
        return False


def touch(device: str) -> float:
    """Compute something small on the device."""
    import torch

    return torch.ones(1, device=device).item()


def run(where: BaseContext, measure: Callable[..., Any], args: tuple[Any, ...], seconds: float, log: Path) -> Any:
    """Return what `measure(*args)` returns in a process of its own.

    Args:
        where: How processes are started.
        measure: A function of a module.
        args: Its arguments.
        seconds: Limit, after which the process is killed.
        log: File to which the process appends all that it prints.

    Raises:
        Stopped: If it took longer.
        Died: If it failed, with the last line of its traceback, or the process ended without a result.
    """
    ours, theirs = where.Pipe(duplex=False)
    process = where.Process(target=_serve, args=(theirs, measure, args, log), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise Stopped(f"stopped after {seconds:.0f} s")
        kind, result = ours.recv()
        process.join(GOODBYE)
    except EOFError:
        process.join(GOODBYE)
        raise Died(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if kind == "failed":
        raise Died(result)
    return result


def _serve(results: Connection, measure: Callable[..., Any], args: tuple[Any, ...], log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        results.send(("done", measure(*args)))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        results.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]))
