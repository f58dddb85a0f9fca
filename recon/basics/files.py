"""Files that are whole or absent, and what a process that was killed has left of them."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Names that `atomic_write` gives to files which are not whole yet."""

Writer = Callable[[Path], AbstractContextManager[Path]]
"""Yields a temporary path that becomes the file when the context ends."""


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


def partial(path: Path) -> Path:
    """Return where the directory `path` is made, before it gets its name by `put_in_place`."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def placing(path: Path, finish: Callable[[Path], AbstractContextManager[Any]] = nullcontext) -> Iterator[Path]:
    """Yield the directory to fill that becomes `path` when the context ends.

    If anything fails, nothing of it is kept, and an older directory at `path` stays as it was.

    Args:
        path: The directory.
        finish: Is given the filled directory; its context ends when that has its name.

    Raises:
        OSError: If the directory cannot be renamed.
    """
    made = partial(path)
    shutil.rmtree(made, ignore_errors=True)
    try:
        yield made
        with finish(made):
            put_in_place(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def put_in_place(path: Path) -> None:
    """Give the finished directory `partial(path)` its name; an older one at `path` is deleted only then.

    Raises:
        OSError: If a directory cannot be renamed.
    """
    settle(path)
    if path.exists():
        path.rename(_aside(path))
    partial(path).rename(path)
    shutil.rmtree(_aside(path), ignore_errors=True)


def settle(path: Path) -> None:
    """End what a process that was killed in `put_in_place` has begun: `path` is its older or its newer content."""
    aside = _aside(path)
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Delete the temporary files that killed calls of `atomic_write` have left in a directory, not in those below.

    No process may be writing there.
    """
    for stale in directory.glob(".*.tmp"):
        if TEMPORARY.fullmatch(stale.name):
            stale.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def write_json(path: str | Path, obj: Any, writing: Writer = atomic_write) -> None:
    """Write `obj` as indented JSON, atomically; floats keep all digits, NaN and Infinity are spelled so.

    Args:
        path: The file.
        obj: Its content.
        writing: Opens the file; `Manifest.writing` records it, too.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    with writing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: type, needs: str, cure: str) -> Any:
    """Read a JSON file that recon wrote.

    Args:
        path: The file.
        kind: `dict` or `list`, the outermost value.
        needs: The owner of the file, for the message, such as `a run directory`.
        cure: What to do about a damaged file.

    Raises:
        ValueError: If the file cannot be read, is no JSON, or holds another kind of value; it names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{needs} needs a JSON file that recon wrote, got {path} ({error}); {cure}") from error
    if not isinstance(content, kind):
        raise ValueError(
            f"{needs} needs a JSON file that recon wrote, got {path}, which holds a {type(content).__name__} in place "
            f"of a {kind.__name__}; {cure}"
        )
    return content


def _sync(path: Path) -> None:
    """Wait until the file's bytes, or the directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
