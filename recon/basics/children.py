"""Child processes that do not outlive their parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
