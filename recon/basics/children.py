"""Child processes that do not outlive their parent."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, Protocol, runtime_checkable

PARENT = "RECON_PARENT"
"""Environment variable: the process whose end ends the one that has it."""


@contextmanager
def parent_of_children() -> Iterator[None]:
    """Within, processes that are started and run recon do not outlive this one."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]


def die_with_parent() -> None:
    """Have the system end this process with its parent, however that ends, if the parent asked for it.

    Without this a child whose parent was killed waits half an hour for it in a rendezvous. Linux only.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before
        sys.exit(1)


class Stopped(Exception):
    """The child processes were stopped, so there is no more to be known of one of them."""


@runtime_checkable
class Process(Protocol):
    """What is asked of a child process, as `subprocess.Popen` has it."""

    stdout: IO[str] | None
    returncode: int | Any

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, value: Any, traceback: Any, /) -> Any: ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit status, negative for a signal that killed it."""
        ...

    def kill(self) -> None:
        """End it at once."""

    def terminate(self) -> None:
        """Have it end as it does at SIGTERM."""


class Children:
    """Child processes that run recon: started from any thread, stopped together, ended by the end of this process.

    The system takes the thread that starts a process for its parent, so that thread has to wait for the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._living: set[Process] = set()
        self._is_stopped = False

    @contextmanager
    def started(
        self, command: Sequence[str], environment: Mapping[str, str], is_recon: bool = True
    ) -> Iterator[Process]:
        """Start a process, and wait for it at the end of the context, whose error ends it.

        Args:
            command: The program and its arguments.
            environment: All variables of the process.
            is_recon: Whether the process itself runs recon, and not what it starts elsewhere: then it ends with ours.

        Yields:
            The process; its output and its errors are lines of `stdout`.

        Raises:
            Stopped: If `stop` was called before the process had ended.
        """
        with self._lock:  # or a process might start just after the others were stopped
            if self._is_stopped:
                raise Stopped
            process = self._start(command, environment, is_recon)
            self._living.add(process)
        try:
            with process:
                try:
                    yield process
                except BaseException:
                    process.kill()
                    raise
        finally:
            self._living.discard(process)
        if self._is_stopped:
            raise Stopped

    def _start(self, command: Sequence[str], environment: Mapping[str, str], is_recon: bool) -> Process:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **({PARENT: str(os.getpid())} if is_recon else {})},
        )

    def stop(self) -> None:
        """Kill all processes, and start no more."""
        with self._lock:
            self._is_stopped = True
            for process in list(self._living):
                process.kill()

    def end(self, patience: float) -> None:
        """Have all processes end as they do at SIGTERM, where a fit saves its state; start no more.

        Args:
            patience: Seconds to wait for them.
        """
        self._is_stopped = True  # without the lock: a handler of signals may call this while it is held
        living = list(self._living)
        for process in living:
            process.terminate()
        end = time.monotonic() + patience
        for process in living:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
