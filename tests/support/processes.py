"""Run a function in several connected processes, with the heavy imports paid once per pytest session."""

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from queue import Empty
from typing import Any
from unittest import mock

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def _start_server() -> None:
    """Start the process that workers are forked from, if it does not run; Python 3.11 does not tell it sys.path."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set; LOCAL_RANK tells Lightning that the processes are there already."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _work(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple, queue: Any) -> None:
    os.environ.update(environment_of(rank, world, port))
    torch.set_num_threads(1)
    try:
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        queue.put((rank, buffer.getvalue(), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


class Failed(Exception):
    """Processes raised; the message has their tracebacks."""


def in_processes(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 120.0) -> list[Any]:
    """Call an importable function in `world` processes; their results by rank.

    Raises:
        Failed: If one of them raised or died; the others have ten seconds to fail too, and are killed.
    """
    _start_server()
    port, queue = free_port(), CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_work, args=(rank, world, port, function, args, queue), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    end = time.monotonic() + timeout
    try:
        while len(results) + len(errors) < world:
            try:
                rank, value, error = queue.get(timeout=0.2)
            except Empty:
                if time.monotonic() > end:
                    errors.setdefault(-1, f"no answer in {timeout} s")
                    break
                for one, process in enumerate(processes):
                    if process.exitcode and one not in errors:
                        errors[one] = f"died with exit code {process.exitcode}"
                        end = min(end, time.monotonic() + 10)
                continue
            if error is None:
                results[rank] = torch.load(io.BytesIO(value))
            else:
                errors[rank] = error
                end = min(end, time.monotonic() + 10)
        if errors:
            raise Failed("\n".join(f"rank {rank}:\n{errors[rank]}" for rank in sorted(errors)))
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
