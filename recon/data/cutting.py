"""A contiguous part of a text that is spread over rows."""

import re
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

ROWS = 10_000
"""Rows whose lengths are counted at a time."""

LONGEST_WORD = 200
"""Characters in which a border looks for white space."""


def part_of(rows: Dataset, begin: int, end: int) -> Dataset:
    """The text between two positions; a border within a word moves to the next white space.

    Parts whose positions meet have no character in common and none between them.

    Args:
        rows: The whole text, in a column `text`.
        begin: Where the part begins, in per cent of the characters.
        end: Where the part ends, in per cent of the characters.
    """
    batches: Any = rows.with_format("arrow").iter(ROWS)
    lengths = [pc.fill_null(pc.utf8_length(batch["text"]), 0).to_numpy() for batch in batches]  # pyright: ignore
    ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))
    (first, skipped), (last, kept) = (_border(rows, ends, percent) for percent in (begin, end))
    if first == last and skipped < kept:
        return _row(rows, first, slice(skipped, kept))
    head = [_row(rows, first, slice(skipped, None))] if skipped and first < last else []
    whole = range(first + len(head), last)
    tail = [_row(rows, last, slice(kept))] if kept and first < last else []
    return concatenate_datasets([*head, rows.select(whole if whole else range(0)), *tail])


def _border(rows: Dataset, ends: np.ndarray, percent: int) -> tuple[int, int]:
    """Row and character within it at which a part begins or ends."""
    if percent == 0 or not len(ends):
        return 0, 0
    position = int(ends[-1]) * percent // 100
    row = int(np.searchsorted(ends, position, side="right"))
    before = int(ends[row - 1]) if row else 0
    if row == len(ends) or position == before:
        return row, 0
    text, character = rows[row]["text"], position - before
    space = re.compile(r"\s").search(text, character, character + LONGEST_WORD)
    character = space.end() if space else character  # some languages put no space between words
    return (row, character) if character < len(text) else (row + 1, 0)


def _row(rows: Dataset, index: int, characters: slice) -> Dataset:
    return Dataset.from_dict({"text": [rows[index]["text"][characters]]}, features=rows.features)
