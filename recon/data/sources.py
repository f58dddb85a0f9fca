"""Where text comes from: one interface over the standard library, local files, saved and hub data sets.

A source yields documents of one of three splits. Splits that a source does not have of its own are carved
out of its train split by a hash of each document's key (a path, or the text itself), so a document stays
in its split when others come and go, and never stands in two.
"""

import hashlib
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets import DatasetDict as DatasetsByName
from datasets.exceptions import DatasetsError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Documents = Dataset | IterableDataset

HELD_OUT_PERCENT: dict[Split, range] = {"test": range(0, 5), "validation": range(5, 10)}
"""Which of 100 hash buckets a carved split takes; train keeps the rest."""


class TextSource(ABC):
    """Documents of a train, a validation and a test split.

    Attributes:
        separator: Text put between documents when they are joined, for documents that are pieces of one
            text, such as lines; None puts the tokenizer's end-of-sequence token there.
        key: The column whose hash decides in which split a document falls, where splits are carved. The
            text itself by default, so that equal documents share a split.
    """

    separator: str | None = None
    key: str = "text"

    @abstractmethod
    def load(self, split: Split) -> Documents:
        """Rows of the source's own `split` with columns `text` and `key`; asked for only if it `has` it."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What identifies the text, found without reading all of it: for fingerprints."""

    def has(self, split: Split) -> bool:
        """Whether the source has `split` of its own."""
        return split == "train"

    def documents(self, split: Split) -> Documents:
        """Documents of `split` with a column `text`, carved out of train where the source has no such split.

        Raises:
            ValueError: If the source has neither the split nor a train split to carve it from.
        """
        carved: list[Split] = [name for name in SPLITS if name != "train" and not self.has(name)]
        if self.has(split) and not (split == "train" and carved):
            return self.load(split)
        if not self.has("train"):
            raise ValueError(f"{self} has neither a {split} split nor a train split to carve it from")
        if split == "train":
            buckets = set(range(100)).difference(*(HELD_OUT_PERCENT[name] for name in carved))
        else:
            buckets = set(HELD_OUT_PERCENT[split])
        return self.load("train").filter(lambda key: _bucket(key) in buckets, input_columns=self.key)


def _bucket(key: str | None) -> int:
    return int.from_bytes(hashlib.sha256((key or "").encode()).digest()[:8], "big") % 100


class StandardLibrary(TextSource):
    """The source code of this Python's standard library, tests excluded: text that every machine has.

    Files fall into splits by a hash of their path below the library, so that the split survives Python
    versions. The text itself differs between versions, so perplexities compare only within one.
    """

    key = "path"

    def __str__(self) -> str:
        return "the Python standard library"

    def load(self, split: Split) -> Documents:
        """The paths of all library files; the splits are carved out of them, `documents` reads them."""
        root, found = _library(), []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in NOT_LIBRARY]  # os.walk then leaves them out
            found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_")]
        if not found:
            raise ValueError(f"{self} needs .py files below {root}, found none; choose another data.source")
        return Dataset.from_dict({"path": [path.relative_to(root).as_posix() for path in sorted(found)]})

    def documents(self, split: Split) -> Documents:
        """As `TextSource.documents`; a file is read when it is asked for, so the text is never all in memory."""
        paths = super().documents(split)
        assert isinstance(paths, Dataset)
        return paths.with_transform(_read_library_files)

    def identity(self) -> dict[str, str]:
        """The Python version decides the text."""
        return {"source": "StandardLibrary", "python": platform.python_version()}


NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read_library_files(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"text": [(_library() / path).read_text(encoding="utf-8", errors="replace") for path in rows["path"]]}


BUILDERS = {
    "txt": "text",
    "text": "text",
    "json": "json",
    "jsonl": "json",
    "csv": "csv",
    "parquet": "parquet",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "paragraph"},
    "csv": {"keep_default_na": False},  # else a document that reads "NA" or "None" is lost
}


class TextFiles(TextSource):
    """Local text, json, jsonl, csv or parquet files.

    Args:
        paths: Files of the train split, and of the splits for which no files are given.
        validation_paths: Files of the validation split; carved out of `paths` if empty.
        test_paths: Files of the test split; carved out of `paths` if empty.
        column: The column that holds the text (ignored for text files, whose documents are paragraphs).
        separator: Text between documents; the tokenizer's end-of-sequence token if not given.
    """

    def __init__(
        self,
        paths: list[str],
        validation_paths: list[str] | None = None,
        test_paths: list[str] | None = None,
        column: str = "text",
        separator: str | None = None,
    ) -> None:
        given = {"train": paths, "validation": validation_paths or [], "test": test_paths or []}
        self.files = {split: [Path(path).expanduser() for path in files] for split, files in given.items()}
        self.paths, self.validation_paths, self.test_paths = paths, validation_paths, test_paths
        self.column = column
        self.separator = separator
        files = [path.resolve() for paths_of_split in self.files.values() for path in paths_of_split]
        if not files:
            raise ValueError("data.source.paths needs at least one file, got none")
        twice = sorted({str(path) for path in files if files.count(path) > 1})
        if twice:
            raise ValueError(f"data.source needs every file in one split, and once, got {', '.join(twice)} twice")

    def __str__(self) -> str:
        files = [str(path) for paths in self.files.values() for path in paths]
        return f"the files {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}"

    def has(self, split: Split) -> bool:
        """Whether files were given for `split`."""
        return bool(self.files[split])

    def load(self, split: Split) -> Documents:
        """Read the files given for `split`.

        Raises:
            ValueError: If a file is missing, empty, of an unknown kind, or lacks the column.
        """
        files = self.files[split]
        option = "data.source.paths" if split == "train" else f"data.source.{split}_paths"
        for file in files:
            if not file.is_file():
                what = "is a directory" if file.is_dir() else "does not exist"
                raise ValueError(f"{option} needs existing files, got {file}, which {what}")
            if file.stat().st_size == 0:
                raise ValueError(f"{option} needs files with text, got {file}, which is empty (0 bytes)")
        builders = {BUILDERS.get(file.suffix.removeprefix(".").lower()) for file in files}
        (builder, *others) = builders
        if builder is None or others:
            raise ValueError(
                f"{option} needs files of one kind out of {', '.join(f'.{suffix}' for suffix in sorted(BUILDERS))}, "
                f"got {', '.join(sorted({file.suffix or file.name for file in files}))}; rename or convert them"
            )
        options = OPTIONS.get(builder, {})
        rows = _load_dataset(option, builder, data_files=[str(file) for file in files], split="train", **options)
        return _text(rows, "text" if builder == "text" else self.column, str(self))

    def identity(self) -> dict[str, str]:
        """A digest of the files' contents."""
        digest = hashlib.sha256()
        for split, files in self.files.items():
            for file in files:
                digest.update(f"{split} {file.name}".encode())
                if file.is_file():  # if not, `load` says so
                    with file.open("rb") as stream:
                        digest.update(hashlib.file_digest(stream, "sha256").digest())
        return {"source": "TextFiles", "column": self.column, "sha256": digest.hexdigest()}


class SavedDataset(TextSource):
    """A data set written by `datasets`' `save_to_disk`, with or without splits.

    Args:
        path: The directory.
        column: The column that holds the text.
        separator: Text between documents; the tokenizer's end-of-sequence token if not given.
    """

    def __init__(self, path: str, column: str = "text", separator: str | None = None) -> None:
        self.path = Path(path).expanduser()
        self.column = column
        self.separator = separator

    def __str__(self) -> str:
        return f"the data set {self.path}"

    def _by_split(self) -> dict[str, Dataset]:
        try:
            saved = load_from_disk(self.path)
        except (OSError, ValueError) as error:  # a file is missing, or is not what it should be
            raise ValueError(
                f"data.source.path needs a directory written by `datasets`' save_to_disk, got {self.path}: {error}"
            ) from error
        splits = saved if isinstance(saved, DatasetsByName) else {"train": saved}
        return {str(name): rows for name, rows in splits.items()}

    def has(self, split: Split) -> bool:
        """Whether the saved data set has `split`."""
        return split in self._by_split()

    def load(self, split: Split) -> Documents:
        """Documents of the saved `split`."""
        return _text(self._by_split()[split], self.column, str(self))

    def identity(self) -> dict[str, str]:
        """`datasets`' own fingerprints of the splits."""
        prints = {split: rows._fingerprint for split, rows in self._by_split().items()}
        return {"source": "SavedDataset", "column": self.column, **prints}


class HubDataset(TextSource):
    """A data set of the Hugging Face hub, by name. The only source that uses the network.

    Args:
        path: Name on the hub, for example `allenai/c4`.
        name: Configuration of the data set, for example `en`.
        revision: Commit, tag or branch; give a commit for reproducible runs.
        column: The column that holds the text.
        splits: Which of the hub's splits serves as ours; those not named are carved out of train.
        streaming: Read on demand instead of downloading the whole data set.
        separator: Text between documents; the tokenizer's end-of-sequence token if not given.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        column: str = "text",
        splits: dict[str, str] | None = None,
        streaming: bool = False,
        separator: str | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.revision = revision
        self.column = column
        self.splits = splits or {split: split for split in SPLITS}
        self.streaming = streaming
        self.separator = separator
        unknown = set(self.splits) - set(SPLITS)
        if unknown:
            raise ValueError(f"data.source.splits maps {', '.join(SPLITS)}, got {', '.join(sorted(unknown))}")

    def __str__(self) -> str:
        return f"the hub data set {self.path}{f' ({self.name})' if self.name else ''}"

    def has(self, split: Split) -> bool:
        """Whether a split of the hub's serves as `split`."""
        return split in self.splits

    def load(self, split: Split) -> Documents:
        """Documents of the hub's split that serves as `split`."""
        rows = _load_dataset(
            "data.source.path, .name and .splits",
            self.path,
            self.name,
            split=self.splits[split],
            revision=self.revision,
            streaming=self.streaming,
        )
        return _text(rows, self.column, str(self))

    def identity(self) -> dict[str, str]:
        """Name, configuration and revision, as given."""
        given = {"path": self.path, "name": self.name or "", "revision": self.revision or ""}
        return {"source": "HubDataset", "column": self.column, **given}


def _load_dataset(option: str, path: str, name: str | None = None, **options: Any) -> Documents:
    """`datasets.load_dataset`, with errors that say which of our options to look at."""
    try:
        return load_dataset(path, name, **options)
    except (DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error  # what went wrong while reading is wrapped in an error that does not say it
        what = options.get("data_files") or path
        raise ValueError(
            f"{option} must name a data set that can be read, got {what}: {shorten(str(reason), 500)}"
        ) from error


def _text(rows: Documents, column: str, source: str) -> Documents:
    """`rows` with `column` as their only one, called `text`."""
    names = rows.column_names or list(next(iter(rows), {}))
    if column not in names:
        raise ValueError(
            f"data.source.column needs a column of {source}, got {column!r}; its columns are {', '.join(names)}"
        )
    kind = getattr(rows.features[column], "dtype", "no text") if rows.features else "string"
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"data.source.column needs a column of text, {column!r} of {source} holds {kind}")
    rows = rows.select_columns(column)
    return rows if column == "text" else rows.rename_column(column, "text")
