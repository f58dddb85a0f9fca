"""The manifest of a run directory: size and sha256 of every file that recon writes there and reads again.

A file counts as the run's own only if it is recorded and as it was written. So a flipped bit, an emptied directory, a
file of another run and one that a killed run left behind are all told from a product. A file is recorded just before it
gets its name, under a lock, for several processes and jobs write to one directory.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recon.basics.digests import remember, sha256_of, state_of
from recon.basics.files import atomic_write, placing, write_json
from recon.basics.locks import locked

log = logging.getLogger("recon")

FORMAT = "recon-manifest-1"
NAME = "manifest.json"

LOADED = (".safetensors", ".json", ".bin", ".model", ".jinja", ".py")
"""Ends of the names of files that libraries load from a model directory if they are there."""

FOR_PEOPLE = (".md",)
"""Ends of the names of files that nothing loads, such as a model's card: a change of theirs is no damage."""


@dataclass(frozen=True)
class Entry:
    """A recorded file.

    Args:
        sha256: Of its content, in hex.
        bytes: Its size.
    """

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "Entry":
        """The entry of a file as it is."""
        return cls(sha256_of(path), path.stat().st_size)


@dataclass(frozen=True)
class Content:
    """A manifest as it was read.

    Args:
        identity: Digest of the run's fingerprint; None of a directory that no run has begun.
        files: Relative path, with slashes -> entry.
    """

    identity: str | None = None
    files: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Records and checks the files of a run directory.

    Args:
        directory: The run directory; its manifest is made with the first record.
    """

    directory: Path

    @property
    def file(self) -> Path:
        """The manifest itself."""
        return self.directory / NAME

    def read(self, fresh: bool = True) -> Content | None:
        """The manifest; None if there is none.

        Args:
            fresh: Open the file even if it seems to be the one that was read last: a network file system may tell so
                some seconds too long.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            state = state_of(self.file)
            if fresh or (held := _read.get(self.file)) is None or held[0] != state:
                held = _read[self.file] = state, _parsed(self.file.read_text(encoding="utf-8"))
            return held[1]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"a run directory needs a whole {NAME} ({FORMAT}), got {self.file}, which is damaged ({reason}); copy "
                f"it again from where it was, or delete {self.directory} to begin anew"
            ) from error

    def begin(self, identity: str) -> None:
        """Begin a run: nothing is recorded. The caller holds `lock`."""
        self._write(Content(identity))

    def lock(self) -> AbstractContextManager[bool]:
        """Keep other processes from changing the manifest until the context ends."""
        return locked(self.directory / f".{NAME}.lock")

    def records(self, *paths: Path) -> dict[Path, Entry]:
        """The recorded files among `paths` and in the directories among them; all of them without `paths`.

        Raises:
            ValueError: If the manifest is damaged.
        """
        return self._records(paths, fresh=True)

    def _records(self, paths: Sequence[Path], fresh: bool) -> dict[Path, Entry]:
        files = (self.read(fresh) or Content()).files
        names = [self._name(path) for path in paths]
        return {self.directory / name: entry for name, entry in files.items() if not paths or _within(name, names)}

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """As `atomic_write`, and record the file.

        Raises:
            OSError: As `atomic_write`.
            ValueError: If the manifest is damaged.
        """
        with ExitStack() as until_renamed:
            with atomic_write(path) as temporary:
                yield temporary
                entry = Entry.of(temporary)
                until_renamed.enter_context(self.lock())
                self._change({self._name(path): entry})
            remember(path, entry.sha256)

    @contextmanager
    def placing(self, path: Path) -> Iterator[Path]:
        """As `recon.basics.files.placing`, and record the files of the directory.

        Raises:
            OSError: If a file cannot be read or the directory cannot be renamed.
            ValueError: If the manifest is damaged.
        """
        entries: dict[Path, Entry] = {}

        @contextmanager
        def record(made: Path) -> Iterator[None]:
            entries.update({path / file.relative_to(made): Entry.of(file) for file in _files(made)})
            with self.lock():
                self._change({self._name(file): entry for file, entry in entries.items()}, without=[path])
                yield

        with placing(path, record) as made:
            yield made
        for file, entry in entries.items():
            remember(file, entry.sha256)

    def record(self, entries: Mapping[Path, Entry]) -> None:
        """Record files that are written already.

        Raises:
            ValueError: If the manifest is damaged.
        """
        with self.lock():
            self._change({self._name(path): entry for path, entry in entries.items()})

    def forget(self, *paths: Path) -> None:
        """Drop the records of files and directories, before they are deleted.

        Raises:
            ValueError: If the manifest is damaged.
        """
        if self.records(*paths):
            with self.lock():
                self._change({}, without=paths)

    def fault(self, path: Path) -> str | None:
        """Say what is wrong with a product; None if it is there and as it was written.

        Args:
            path: A file; or a directory, which has to hold its recorded files, but those for people, and no others that
                would be loaded.

        Raises:
            ValueError: If the manifest is damaged.
        """
        entries = self._records([path], fresh=False) or self.records(path)
        if not entries:
            return f"{path} is {'not recorded in' if path.exists() else 'missing, and not in'} {self.file}"
        needed = {file: one for file, one in entries.items() if file == path or file.suffix not in FOR_PEOPLE}
        found = next((fault for file, entry in needed.items() if (fault := self.fault_of(file, entry))), None)
        if found is None and path.is_dir():
            strange = [file for file in _files(path) if file not in entries and file.suffix in LOADED]
            return f"{strange[0]} is not recorded in {self.file}" if strange else None
        return found

    def fault_of(self, file: Path, entry: Entry) -> str | None:
        """As `fault`, of one recorded file."""
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != entry.bytes:
            return f"{file} has {size} bytes, {entry.bytes} were written: damaged"
        return None if sha256_of(file) == entry.sha256 else f"{file} has not the sha256 that was written: damaged"

    def is_intact(self, path: Path) -> bool:
        """Whether a product can be used; if it is there and cannot, a warning says why.

        Raises:
            ValueError: If the manifest is damaged.
        """
        if not path.exists():
            return False
        fault = self.fault(path)
        if fault is not None and fault not in _told:
            _told.add(fault)
            log.warning(f"{fault}; it is made again")
        return fault is None

    def require(self, path: Path, cure: str) -> None:
        """Refuse a product that is not as it was written.

        Args:
            path: A file or a directory.
            cure: For the message.

        Raises:
            ValueError: Naming the file, with what is wrong.
        """
        if fault := self.fault(path):
            raise ValueError(f"a run directory needs its files as recon wrote them, got a damaged one: {fault}; {cure}")

    def _change(self, entries: Mapping[str, Entry], without: Iterable[Path] = ()) -> None:
        """Write the manifest with other records. The caller holds `lock`."""
        held, gone = self.read() or Content(), [self._name(path) for path in without]
        kept = {name: entry for name, entry in held.files.items() if not _within(name, gone)}
        self._write(Content(held.identity, kept | dict(entries)))

    def _write(self, content: Content) -> None:
        files = {name: vars(content.files[name]) for name in sorted(content.files)}
        write_json(self.file, {"format": FORMAT, "identity": content.identity, "files": files})

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.directory)).as_posix()


def require_unchanged(path: Path, cure: str) -> None:
    """Refuse a file or directory from anywhere if recon has recorded it beside it and it is not as it was written.

    Args:
        path: Of a run directory, or of none.
        cure: For the message.

    Raises:
        ValueError: Naming the file, with what is wrong.
    """
    manifest = Manifest(path.parent)
    if manifest.records(path):
        manifest.require(path, cure)


_told: set[str] = set()

_read: dict[Path, tuple[tuple[int, ...], Content]] = {}


def _parsed(text: str) -> Content:
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}")
    if not isinstance(content["identity"], str | None):
        raise TypeError("an identity that is no text")
    files = {str(name): _entry(name, entry) for name, entry in content["files"].items()}
    return Content(content["identity"], files)


def _entry(name: str, given: Any) -> Entry:
    entry = Entry(**given)
    if not (isinstance(entry.sha256, str) and isinstance(entry.bytes, int)):
        raise TypeError(f"{name} without sha256 and bytes")
    return entry


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _within(name: str, of: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}/") for one in of)
