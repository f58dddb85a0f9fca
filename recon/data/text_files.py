"""Local files as a source of text: plain text, JSON, CSV and Parquet."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from recon.data.damage import damage
from recon.data.reading import Documents, read, text_of
from recon.data.sources import TextSource, bucket_of_digest
from recon.data.token_source import Split

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

    Splits without files are carved out of `paths`. A text file is one document: it falls into one split by a hash of
    its contents. A single text file is cut into contiguous parts: train, validation, test. So are several, joined in
    the order given, if a split would get none of them. In files of the other kinds each row is a document.

    Args:
        paths: Files of the train split, and of the splits for which no files are given.
        validation_paths: Files of the validation split; carved out of `paths` if empty.
        test_paths: Files of the test split; carved out of `paths` if empty.
        column: The column that holds the text (ignored for text files, whose paragraphs are joined).
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

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The noun for what is hashed: a row is a document, and so is a text file."""
        return "file" if self._is_text("train") else "document"

    @property
    def is_continuous(self) -> bool:
        """Whether the train split is one text: a single text file, or too few of them for three splits of whole files.

        Rows with a separator are pieces of one text, too.
        """
        if not self._is_text("train"):
            return super().is_continuous
        return not all(self._whole(split) for split in ("train", *self._carved()))

    def load(self, split: Split) -> Documents:
        """Read the files given for `split`.

        Raises:
            ValueError: If a file is missing, empty, damaged, of an unknown kind, or lacks the column.
        """
        return self._read(split, self.files[split])

    def _chosen(self, split: Split) -> Documents:
        return self._read("train", self._whole(split)) if self._is_text("train") else super()._chosen(split)

    def _whole(self, split: Split) -> list[Path]:
        """The files of train whose contents' hash puts them into `split`; equal files share a split."""
        buckets = self._buckets(split)
        return [file for file, bucket in self._bucket_of_file.items() if bucket in buckets]

    @cached_property
    def _bucket_of_file(self) -> dict[Path, int]:
        self._kind("train")
        return {file: bucket_of_digest(_digest(file)) for file in self.files["train"]}

    def _is_text(self, split: Split) -> bool:
        return {_builder(file) for file in self.files[split]} == {"text"}

    def _kind(self, split: Split) -> str:
        """The builder that reads the files of `split`, which are there, not empty and of one kind."""
        files, option = self.files[split], _option(split)
        for file in files:
            if not file.is_file():
                state = "is a directory" if file.is_dir() else "does not exist"
                raise ValueError(f"{option} needs existing files, got {file}, which {state}")
            if file.stat().st_size == 0:
                raise ValueError(f"{option} needs files with text, got {file}, which is empty (0 bytes)")
        (builder, *others) = {_builder(file) for file in files}
        if builder is None or others:
            raise ValueError(
                f"{option} needs files of one kind out of {', '.join(f'.{suffix}' for suffix in sorted(BUILDERS))}, "
                f"got {', '.join(sorted({file.suffix or file.name for file in files}))}; rename or convert them"
            )
        return builder

    def _read(self, split: Split, files: list[Path]) -> Documents:
        """Rows of `files`, some of those that are given for `split`."""
        builder = self._kind(split)
        column = "text" if builder == "text" else self.column
        try:
            documents = text_of(self.rows(split, files), column, str(self))
            batches: Any = documents.with_format("arrow").iter(10_000)
            for batch in batches:
                batch.validate(full=True)  # text that is not UTF-8, which else nobody sees before it is tokenised
        except ValueError as error:
            if (found := damage(files, builder, column)) is None:
                raise
            raise ValueError(f"{_option(split)} needs files that can be read, got {found}") from error
        return documents

    def rows(self, split: Split, files: list[Path] | None = None) -> Documents:
        """Rows of `files`, or of all that are given for `split`, with all their columns.

        Raises:
            ValueError: If a file is missing, empty, damaged or of an unknown kind.
        """
        builder, names = self._kind(split), [str(file) for file in (self.files[split] if files is None else files)]
        return read(_option(split), builder, data_files=names, split="train", **OPTIONS.get(builder, {}))

    def identity(self) -> dict[str, str]:
        """A digest of the files' contents."""
        digest = hashlib.sha256()
        for split, files in self.files.items():
            for file in files:
                digest.update(f"{split} {file.name}".encode())
                if file.is_file():  # if not, `load` says so
                    digest.update(_digest(file))
        return {"source": "TextFiles", "column": self.column, "sha256": digest.hexdigest()}


def _builder(file: Path) -> str | None:
    return BUILDERS.get(file.suffix.removeprefix(".").lower())


def _option(split: Split) -> str:
    return "data.source.paths" if split == "train" else f"data.source.{split}_paths"


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
