"""Locks between processes. The lock of a process that dies is free again, for the system lets go of it."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recon.basics.files import write_json


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Go through the block while no other process on this file system goes through one with the same `path`.

    Args:
        path: The lock's file, which stays, empty.
        wait: Wait until the lock is free; otherwise go through the block at once, with or without it.

    Yields:
        Whether the lock is held here; always True after waiting.

    Raises:
        OSError: If the file system has no locks, or the file cannot be made, naming `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, held = FileLock(path), True
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        held = False
    except OSError as error:
        raise OSError(
            error.errno, f"could not lock `{path}` ({error}); use a file system with locks that can be written"
        ) from error
    try:
        yield held
    finally:
        lock.release()


@contextmanager
def owned(directory: Path, part: Path | None = None) -> Iterator[None]:
    """Own a run directory until the context ends.

    The owner of a part shares the directory with those of other parts; the owner of the whole shares it with nobody.
    Beside the lock a JSON file tells who the owner is.

    Args:
        directory: The run directory; made if it is missing.
        part: Directory of a part, in `<directory>/parts`, if only that is to be owned.

    Raises:
        ValueError: If another process owns the directory or the part, naming its host and process.
    """
    ours = part or directory
    try:
        ours.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"run_dir needs a directory that can be made and written, got {str(ours)!r} ({error}); name another one"
        ) from error
    with ExitStack() as stack:
        with locked(directory / ".owner.gate"):  # for a moment, in which nobody else becomes an owner
            for other in [directory] if part is not None else sorted(directory.glob("parts/*/")):
                with locked(_lock(other), wait=False) as is_free:
                    if not is_free:
                        raise ValueError(_in_use(directory, other))
            if not stack.enter_context(locked(_lock(ours), wait=False)):
                raise ValueError(_in_use(directory, ours))
        stack.callback(_owner(ours).unlink, missing_ok=True)
        write_json(_owner(ours), _myself())
        yield


def _lock(directory: Path) -> Path:
    return directory / ".owner.lock"


def _owner(directory: Path) -> Path:
    return directory / ".owner.json"


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": shlex.join(sys.argv),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _in_use(directory: Path, held: Path) -> str:
    try:
        owner = json.loads(_owner(held).read_text(encoding="utf-8"))
        who = f"process {owner['process']} on host {owner['host']}, since {owner['since']}"
    except (OSError, ValueError):  # it has the lock and did not write its name yet
        who = "a process that has just begun"
    what = "" if held == directory else f" ({held.name})"
    return (
        f"a run directory needs to be free, got {directory}{what}, owned by {who}; wait until it ends, stop it, or "
        f"name another run_dir"
    )
