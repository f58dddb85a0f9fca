"""Files that are whole or absent, locks, and tensors that live in a file instead of memory."""

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import ALLOCATIONGRANULARITY, mmap
from os import SEEK_END
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path` that becomes `path` when the context ends.

    Missing directories are made. If anything fails, the temporary file is removed and an older file at `path`
    stays as it was.

    Raises:
        OSError: If the file cannot be written (full disk, no permission), naming `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made here to learn the mode that the umask gives: safetensors replaces it by a file that only its
        # owner can read, which a shared cluster notices late.
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777
        try:
            yield temporary
            temporary.chmod(mode)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        message = f"could not write `{path}` ({error}); free space, or choose a directory that can be written"
        number = getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Go through the block while no other process on this file system goes through one with the same `path`.

    A process that dies lets go of the lock; the file stays, empty.

    Raises:
        OSError: If the file system has no locks, naming `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(error.errno, f"could not lock `{path}` ({error}); use a file system with locks") from error
        yield


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; floats keep all digits, NaN and Infinity are spelled so."""
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until the file's bytes, or the directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mapped(file: IO[bytes], shape: Sequence[int], dtype: "torch.dtype") -> "torch.Tensor":
    """An uninitialised tensor at the end of `file`, whose pages the system reads and writes back as it sees fit.

    A file without a name (`tempfile.TemporaryFile`) may be closed at once: its content goes with the last tensor in
    it, or with the process, however that ends.

    Raises:
        OSError: If the disk has no room for all of it. Without reserving it the process would be killed where it
            first writes to a page that the disk has no room for.
    """
    import torch  # reports are read without it

    length = math.prod(shape) * dtype.itemsize
    start = -(-file.seek(0, SEEK_END) // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, length)
    else:  # macOS
        file.truncate(start + length)
    return torch.frombuffer(mmap(file.fileno(), length, offset=start), dtype=dtype).view(*shape)
