"""Sources of text: one interface over the standard library, saved and hub data sets; local files have their own module.

A source yields documents of one of three splits. Splits that a source lacks are carved out of its train split, in one
of two ways. Independent documents are divided by a hash of their key (a path, or the text itself): a document stays in
its split when others come and go, and never stands in two. One continuous text is cut by position into three
contiguous parts, because its pieces are not independent of each other.
"""

import hashlib
import os
import platform
import sysconfig
from abc import abstractmethod
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor

from recon.data.reading import Documents, read, text_of, unreadable
from recon.data.token_source import SPLITS, Draw, Split, TokenSource
from recon.data.tokens import sequences

HELD_OUT_PERCENT: dict[Split, range] = {"test": range(0, 5), "validation": range(5, 10)}
"""Hash buckets, of 100, that a carved split takes; their number is its share of a text cut by position."""


class TextSource(TokenSource):
    """Documents of a train, a validation and a test split, joined and cut into sequences.

    Attributes:
        separator: Text between joined documents, for documents that are pieces of one text, such as lines; None puts
            the tokenizer's end-of-sequence token there.
        key: The column whose hash decides the split of a document, where splits are carved. The text itself by
            default, so that equal documents share a split.
        unit: The noun for what is hashed.
    """

    is_joined = True
    separator: str | None = None
    key: str = "text"
    unit: str = "document"

    @abstractmethod
    def load(self, split: Split) -> Documents:
        """Rows of the source's own `split` with columns `text` and `key`; called only if it `has` that split."""

    def has(self, split: Split) -> bool:
        """Whether the source has `split` of its own."""
        return split == "train"

    @property
    def is_continuous(self) -> bool:
        """Whether the train split is one text, to be cut by position, and not a set of independent documents."""
        return self.separator is not None

    def documents(self, split: Split) -> Documents:
        """Documents of `split` with a column `text`, carved out of train where the source has no such split.

        Raises:
            ValueError: If the source has neither the split nor a train split to carve it from.
        """
        carved = self._carved()
        if self.has(split) and not (split == "train" and carved):
            return self.load(split)
        if not self.has("train"):
            raise ValueError(f"{self} has neither a {split} split nor a train split to carve it from")
        return self._cut(split) if self.is_continuous else self._chosen(split)

    def sequences(self, split: Split, draw: Draw) -> Tensor:
        """See `TokenSource`; `recon.data.tokens.sequences` says how documents are joined, cut and chosen."""
        return sequences(
            self.documents(split),
            draw.tokenizer,
            draw.seq_len,
            draw.num_sequences,
            draw.seed,
            self.separator,
            self.origin(split),
        )

    def origin(self, split: Split) -> str:
        """See `TokenSource`; with how the split is carved out of train, if it is."""
        carving = self.carving(split)
        return f"{super().origin(split)}{f' (it has none: {carving})' if carving else ''}"

    def cut(self, split: Split) -> str:
        """See `TokenSource`."""
        return self.carving(split) if self.is_continuous else ""

    def carving(self, split: Split) -> str:
        """How `split` is carved out of train, for reports and messages; empty if the source has it."""
        if self.has(split):
            return ""
        begin, end = self._range(split)
        if self.is_continuous:
            return f"{begin} to {end} % of the train text, by position"
        return f"{end - begin} % of train by a hash of each {self.unit}"

    def _carved(self) -> list[Split]:
        return [name for name in SPLITS if name != "train" and not self.has(name)]

    def _buckets(self, split: Split) -> set[int]:
        if split == "train":
            return set(range(100)).difference(*(HELD_OUT_PERCENT[name] for name in self._carved()))
        return set(HELD_OUT_PERCENT[split])

    def _range(self, split: Split) -> tuple[int, int]:
        """First and last per cent of `split` in a text cut by position: train, validation, test."""
        sizes = {name: len(self._buckets(name)) for name in SPLITS if name == "train" or name in self._carved()}
        before = sum(sizes[name] for name in SPLITS[: SPLITS.index(split)] if name in sizes)
        return before, before + sizes[split]

    def _chosen(self, split: Split) -> Documents:
        """The documents of train whose hash puts them into `split`."""
        buckets = self._buckets(split)
        return self.load("train").filter(lambda key: bucket(key) in buckets, input_columns=self.key)

    def _cut(self, split: Split) -> Documents:
        """The contiguous part of train that is `split`."""
        from datasets import IterableDataset

        from recon.data.cutting import part_of

        rows = self.load("train")
        if isinstance(rows, IterableDataset):
            raise ValueError(
                f"data.source.separator makes {self} one text, to be cut into splits by position, which needs its "
                f"length, got streaming: true; set data.source.streaming: false, or name a {split} split in "
                f"data.source.splits"
            )
        return part_of(rows, *self._range(split))


def bucket(key: str | None) -> int:
    """One of 100 hash buckets, which decides the split of a document."""
    return bucket_of_digest(hashlib.sha256((key or "").encode()).digest())


def bucket_of_digest(digest: bytes) -> int:
    """The bucket of a document whose key has this sha256."""
    return int.from_bytes(digest[:8], "big") % 100


class StandardLibrary(TextSource):
    """The source code of this Python's standard library, tests excluded: text that every machine has.

    Files fall into splits by a hash of their path below the library, which is the same in all Python
    versions. The text differs between versions, so perplexities compare only within one.
    """

    key = "path"
    unit = "file"

    def __str__(self) -> str:
        return "the Python standard library"

    def load(self, split: Split) -> Documents:
        """The paths of all library files; `documents` reads them."""
        from datasets import Dataset

        root, found = _library(), []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in NOT_LIBRARY]  # os.walk then leaves them out
            found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_")]
        if not found:
            raise ValueError(f"{self} needs .py files below {root}, found none; choose another data.source")
        return Dataset.from_dict({"path": [path.relative_to(root).as_posix() for path in sorted(found)]})

    def documents(self, split: Split) -> Documents:
        """As `TextSource.documents`; each file is read when its row is, so memory never holds all of the text."""
        from datasets import Dataset

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

    def _by_split(self) -> dict[str, Any]:
        from datasets import DatasetDict, load_from_disk

        try:
            saved = load_from_disk(self.path)
        except unreadable() as error:
            raise ValueError(
                f"data.source.path needs a directory with rows, written by `datasets`' save_to_disk, got {self.path}: "
                f"{shorten(f'{type(error).__name__}: {error}', 500)}; save the data set again"
            ) from error
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        return {str(name): rows for name, rows in splits.items()}

    def has(self, split: Split) -> bool:
        """Whether the saved data set has `split`."""
        return split in self._by_split()

    def load(self, split: Split) -> Documents:
        """Documents of the saved `split`."""
        return text_of(self._by_split()[split], self.column, str(self))

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
        splits: The hub's split for each of ours; those not named are carved out of train.
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
        if not path:
            raise ValueError("data.source.path needs the name of a data set on the hub, got an empty one")
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
        return text_of(self.rows(split), self.column, str(self))

    def rows(self, split: Split) -> Documents:
        """Rows of the hub's split that serves as `split`, with all their columns."""
        return read(
            "data.source.path, .name and .splits",
            self.path,
            self.name,
            split=self.splits[split],
            revision=self.revision,
            streaming=self.streaming,
        )

    def identity(self) -> dict[str, str]:
        """Name, configuration and revision, as given."""
        given = {"path": self.path, "name": self.name or "", "revision": self.revision or ""}
        return {"source": "HubDataset", "column": self.column, **given}
