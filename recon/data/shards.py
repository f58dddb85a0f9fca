"""Files of token sequences: Arrow tables of one column, written once and mapped into memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

COLUMN = "input_ids"

ROWS = 1024
"""Sequences of a record batch."""

READS = 4096
"""Sequences read before files are mapped anew: a page stays in the count of a process's memory while it is mapped."""


def write_shard(path: Path, token_ids: Iterable[Sequence[int]], seq_len: int) -> int:
    """Join token ids and cut them into the sequences of a file. The rest, shorter than a sequence, is dropped.

    Args:
        path: The file.
        token_ids: Token ids of each document.
        seq_len: Tokens per sequence.

    Returns:
        How many sequences there are.
    """
    num, rest = 0, np.zeros(0, np.int32)
    schema = pa.schema([(COLUMN, pa.list_(pa.int32(), seq_len))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for ids in _pieces(token_ids, ROWS * seq_len):
            joined = np.concatenate([rest, ids])
            whole = len(joined) // seq_len
            rows = pa.FixedSizeListArray.from_arrays(pa.array(joined[: whole * seq_len]), seq_len)
            writer.write_batch(pa.record_batch([rows], schema=schema))
            num, rest = num + whole, joined[whole * seq_len :]
    return num


def _pieces(token_ids: Iterable[Sequence[int]], size: int) -> Iterable[np.ndarray]:
    """The joined token ids in pieces of at least `size`, but for the last."""
    held: list[np.ndarray] = []
    length = 0
    for ids in token_ids:
        held.append(np.asarray(ids, np.int32))
        length += len(ids)
        if length >= size:
            yield np.concatenate(held)
            held, length = [], 0
    if held:
        yield np.concatenate(held)


def num_rows(path: Path) -> int:
    """The sequences of a file."""
    return _mapped([path]).num_rows


def extremes(path: Path) -> tuple[int, int]:
    """The smallest and the largest token id of a file that holds sequences."""
    found = pc.min_max(pc.list_flatten(_mapped([path]).data.column(COLUMN)))  # pyright: ignore[reportAttributeAccessIssue]
    return found["min"].as_py(), found["max"].as_py()


def _mapped(files: Sequence[Path]) -> Any:
    """Rows of all files as Arrow tables, none of them read yet."""
    from datasets import Dataset as Rows
    from datasets import concatenate_datasets

    return concatenate_datasets([Rows.from_file(str(file)) for file in files]).with_format("arrow")


class MappedSequences(Dataset):
    """The first sequences of several files, as dicts for a causal language model.

    The private memory of a process is that of a batch. Pages of the files belong to the system's cache, which all
    processes share.

    Args:
        files: Files of `write_shard`, in order.
        num: How many sequences.
    """

    def __init__(self, files: Sequence[Path], num: int) -> None:
        self.files, self.num = files, num
        self._rows: Any = None
        self._left = 0

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Read the sequences of a batch at once; DataLoader calls it."""
        if self._left <= 0:
            self._rows = None  # the older maps go first
            self._rows, self._left = _mapped(self.files), READS
        self._left -= len(indices)
        column = self._rows[indices].column(COLUMN).combine_chunks()
        ids = torch.from_numpy(column.flatten().to_numpy().reshape(len(indices), -1).astype(np.int64))
        return [{"input_ids": row} for row in ids]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None, "_left": 0}
