"""Rows of documents, read with `datasets`, and errors that name recon's options."""

from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents = Dataset | IterableDataset
else:
    Documents = Any  # `datasets` is imported by those who read text: a run on tokens of one's own needs none of it


def unreadable() -> tuple[type[Exception], ...]:
    """List what `datasets` raises on missing, damaged or foreign data; RuntimeError where they come with a script."""
    from datasets.exceptions import DatasetsError

    return DatasetsError, OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError


def read(option: str, path: str, name: str | None = None, **options: Any) -> Documents:
    """`datasets.load_dataset`, with errors that name our options.

    Raises:
        ValueError: If the data set cannot be read.
    """
    from datasets import load_dataset

    try:
        return load_dataset(path, name, **options)
    except unreadable() as error:
        reason = error.__cause__ or error  # `datasets` wraps the error of the reader in one that does not say it
        what = ", ".join(options.get("data_files") or [path])
        cure = "; give data.source.revision: refs/convert/parquet" if "scripts are no longer" in f"{reason}" else ""
        raise ValueError(
            f"{option} must name a data set that can be read, got {what}: {shorten(f'{reason}', 500)}{cure}"
        ) from error


def text_of(rows: Documents, column: str, source: str) -> Documents:
    """`rows` with `column` as their only one, called `text`.

    Raises:
        ValueError: If there is no such column, or it holds no text.
    """
    require_column(rows, column, source)
    kind = getattr(rows.features[column], "dtype", "no text") if rows.features else "string"
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"data.source.column needs a column of text, {column!r} of {source} holds {kind}")
    rows = rows.select_columns(column)
    return rows if column == "text" else rows.rename_column(column, "text")


def require_column(rows: Documents, column: str, source: str) -> None:
    """Refuse the name of a column that is not there.

    Raises:
        ValueError: With the columns that are.
    """
    names = rows.column_names or list(next(iter(rows), {}))
    if column not in names:
        raise ValueError(
            f"data.source.column needs a column of {source}, got {column!r}; its columns are {', '.join(names)}"
        )
