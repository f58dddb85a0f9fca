"""The sha256 of JSON content, and of files: computed once in a process as long as nobody writes to them."""

import hashlib
import json
from pathlib import Path
from typing import Any

_known: dict[Path, tuple[tuple[int, ...], str]] = {}


def digest(content: Any) -> str:
    """Sha256 of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hex, read in pieces; known already if the file is as it was when it was last asked for.

    Raises:
        OSError: If the file cannot be read.
    """
    path = path.absolute()
    state = state_of(path)
    if path not in _known or _known[path][0] != state:
        with path.open("rb") as file:
            _known[path] = state, hashlib.file_digest(file, "sha256").hexdigest()
    return _known[path][1]


def remember(path: Path, sha256: str) -> None:
    """Note the sha256 of a file that this process has hashed under another name, before it was renamed."""
    _known[path.absolute()] = state_of(path), sha256


def state_of(path: Path) -> tuple[int, ...]:
    """Numbers that change with a file's content; the time of the last change of its inode cannot be set back.

    Raises:
        OSError: If there is no such file.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
