"""The pattern that masks were made by, kept with them in their file, and the check that they keep to it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import numpy as np
from torch import Tensor

from recon.pruning.patterns import NM, Counted, Pattern, Unstructured

KEY = "rule"
"""Key in the metadata of masks: the pattern as JSON, and the matrices that are stored in x out."""

KINDS = {kind.__name__: kind for kind in (Unstructured, NM, Counted)}

Shapes = Mapping[str, tuple[int, ...]]


def recorded(pattern: Pattern, transposed: Iterable[str]) -> dict[str, str]:
    """The metadata of masks that tell their pattern; empty for a pattern of a user's own class.

    Args:
        pattern: The pattern of all matrices.
        transposed: Names of the matrices that are stored in x out.
    """
    kind = type(pattern)
    if KINDS.get(kind.__name__) is not kind:
        return {}
    return {KEY: json.dumps({"pattern": kind.__name__, **asdict(pattern), "transposed": sorted(transposed)})}  # pyright: ignore


def transposed_in(metadata: Mapping[str, str]) -> set[str] | None:
    """Names of the matrices that are stored in x out, as the metadata of masks tells; None if it does not."""
    return set(json.loads(metadata[KEY])["transposed"]) if KEY in metadata else None


def broken(metadata: Mapping[str, str], packed: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    """Say where masks do not keep to the pattern in their metadata; None if they do, or if it tells none.

    Args:
        metadata: Of the masks.
        packed: Parameter name -> mask, eight weights a byte, row-major, the first in the lowest bit.
        shapes: Parameter name -> shape of the mask, in the parameter's layout.

    Raises:
        ValueError: If the metadata is no pattern.
    """
    if KEY not in metadata:
        return None
    try:
        options = json.loads(metadata[KEY])
        kind, transposed = KINDS[options.pop("pattern")], options.pop("transposed")
        pattern: Pattern = kind(**options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"their record of a pattern cannot be read ({error})") from error
    if isinstance(pattern, Unstructured) and pattern.across_model:
        return _broken_together(pattern, packed, shapes)
    for name, bits in packed.items():
        if found := _broken_matrix(pattern, name, bits.numpy(), shapes[name], name in transposed):
            return found
    return None


def _broken_together(pattern: Unstructured, packed: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    num = sum(int(np.prod(shape)) for shape in shapes.values())
    kept = sum(int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64)) for bits in packed.values())
    return None if kept == pattern.num_kept(num) else f"{kept} of all {num} weights, not {pattern.num_kept(num)}"


def _broken_matrix(
    pattern: Pattern, name: str, packed: np.ndarray, shape: tuple[int, ...], is_transposed: bool
) -> str | None:
    if is_transposed:
        shape, bits = shape[::-1], _unpacked(packed, shape).T
        packed = np.packbits(bits.ravel(), bitorder="little")
    num_rows, num_columns = shape
    if isinstance(pattern, Counted) and name not in pattern.zeros:
        return f"`{name}`, which the pattern does not name"
    for rows, part in pattern.parts(name, num_rows, num_columns):
        first, last, _ = rows.indices(num_rows)
        if first == last or (run := part.kept_in(last - first, num_columns)) is None:
            continue
        length, kept = run
        counts = _kept_in_runs(packed, first * num_columns, (last - first) * num_columns, length)
        if counts is None or (counts != kept).any():
            got = f"no whole runs of {length}" if counts is None else f"{counts[counts != kept][0]} of {length}"
            return f"{got} weights in `{name}`, not {kept}"
    return None


def _kept_in_runs(packed: np.ndarray, first: int, num: int, length: int) -> np.ndarray | None:
    """Count the survivors of each run of `length` of the `num` weights from `first` on; None if runs are not whole."""
    if num % length:
        return None
    if first % 8 == 0 and length % 8 == 0:
        counts = np.bitwise_count(packed[first // 8 : (first + num) // 8]).reshape(-1, length // 8)
        return counts.sum(axis=1, dtype=np.int64)
    if first % 8 == 0 and 8 % length == 0:  # several runs in a byte
        some = packed[first // 8 : -(-(first + num) // 8)]
        counts = [np.bitwise_count((some >> at) & ((1 << length) - 1)) for at in range(0, 8, length)]
        return np.stack(counts, axis=1).ravel()[: num // length]
    bits = np.unpackbits(packed, count=first + num, bitorder="little")[first:]
    return bits.reshape(-1, length).sum(axis=1, dtype=np.int64)


def _unpacked(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(packed, count=int(np.prod(shape)), bitorder="little").reshape(shape)
