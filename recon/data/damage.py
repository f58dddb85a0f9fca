"""The first damaged place in files of text, for a message that names file and line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile


def damage(files: list[Path], builder: str, column: str) -> str | None:
    """Where a file cannot be read, why, and the cure; None if none of them has a fault known here.

    Args:
        files: What could not be read.
        builder: Kind of the files: text, json, csv or parquet.
        column: The column that should hold the text.
    """
    for file in files:
        found = _parquet(file) if builder == "parquet" else _encoding(file) or _OTHERS[builder](file, column)
        if found is not None:
            return found
    return None


def _encoding(file: Path) -> str | None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"{file}, line {number}: it is not UTF-8 (byte 0x{line[error.start]:02x}); convert the file, for "
                    f"example with iconv -f latin1 -t utf-8"
                )
    return None


def _json(file: Path, column: str) -> str | None:
    text = file.read_text(encoding="utf-8")
    if not text.strip():
        return f"{file}, which holds white space only"
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if file.suffix.lower() == ".json" and text.lstrip().startswith("["):
            return f"{file}, line {error.lineno}: it is no JSON ({error.msg}); correct the file"
        return _json_lines(file, column)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if found := _row(row, column):
            return f"{file}, row {number}: {found}"
    return None


def _json_lines(file: Path, column: str) -> str | None:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = _row(json.loads(line), column) if line.strip() else None
            except json.JSONDecodeError as error:
                found = f"it is no JSON ({error.msg}); correct or delete the line"
            if found:
                return f"{file}, line {number}: {found}"
    return None


def _row(row: object, column: str) -> str | None:
    if not isinstance(row, dict):
        return f"it is {_kind(row)}; each row needs an object such as {json.dumps({column: 'words'})}"
    if not isinstance(value := row.get(column), str | None):
        return f"{column!r} is {_kind(value)}; it needs a string"
    return None


def _kind(value: object) -> str:
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", int: "a number"}
    return kinds.get(type(value), "a number" if isinstance(value, float) else "null")


def _csv(file: Path, column: str) -> str | None:
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream, strict=True)
        try:
            if (head := next(rows, None)) is None:
                return f"{file}, which holds white space only"
            line = 0
            for row in rows:
                line = rows.line_num
                if len(row) > len(head):
                    return (
                        f"{file}, line {line}: it has {len(row)} fields, the header has {len(head)}; put text with "
                        f"commas in quotes"
                    )
        except csv.Error as error:
            return f"{file}, line {rows.line_num}: {error}; correct the quotes"
    return None if line else f"{file}, which holds a header and no rows"


def _parquet(file: Path) -> str | None:
    try:
        ParquetFile(file)
    except (ArrowException, OSError) as error:
        return f"{file}, which is no Parquet file or is damaged ({error}); write it again"
    return None


_OTHERS: dict[str, Callable[[Path, str], str | None]] = {
    "text": lambda file, column: None,
    "json": _json,
    "csv": _csv,
}
