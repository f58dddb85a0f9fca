"""The pattern that masks were made by, kept with them in their file, and the check that they keep to it."""

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict

import numpy as np
from torch import Tensor

from recon.models.matrices import Matrix
from recon.pruning.bits import bits_between, count_bits
from recon.pruning.patterns import NM, Counted, Experts, Pattern, Unstructured

KEY = "rule"
"""Key in the metadata of masks: the pattern as JSON, the parameters that are stored in x out, and the slices of masked
parameters that are kept whole."""

KINDS = {kind.__name__: kind for kind in (Unstructured, NM, Counted, Experts)}

Shapes = Mapping[str, tuple[int, ...]]


def recorded(pattern: Pattern, matrices: Iterable[Matrix]) -> dict[str, str]:
    """The metadata of masks that tell their pattern; empty for a pattern of a user's own class.

    Args:
        pattern: The pattern of all matrices.
        matrices: The matrices that are pruned.
    """
    kind, matrices = type(pattern), list(matrices)
    if KINDS.get(kind.__name__) is not kind:
        return {}
    places = {"transposed": sorted({one.parameter_name for one in matrices if one.is_transposed})}
    if whole := _whole_slices(matrices):
        places["whole"] = whole
    return {KEY: json.dumps({"pattern": kind.__name__, **asdict(pattern), **places})}  # pyright: ignore


def _whole_slices(matrices: list[Matrix]) -> list[str]:
    """List the slices that are not pruned while others of their parameter are."""
    pruned = {one.name for one in matrices if one.index is not None}
    stacks = {one.parameter_name: len(one.parameter) for one in matrices if one.index is not None}
    names = [f"{name}.{index}" for name, num in stacks.items() for index in range(num)]
    return [name for name in names if name not in pruned]


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
        whole = frozenset(options.pop("whole", ()))
        pattern: Pattern = kind(**options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"their record of a pattern cannot be read ({error})") from error
    if isinstance(pattern, Unstructured) and pattern.across_model:
        return _broken_together(pattern, packed, shapes, whole)
    if isinstance(pattern, Experts):
        return _broken_experts(pattern, packed, shapes)
    for parameter, mask in packed.items():
        for name, shape, bits in matrices_in(parameter, mask, shapes[parameter]):
            if name in whole:
                if found := _broken_whole(name, bits, shape):
                    return found
            elif found := _broken_matrix(pattern, name, bits.numpy(), shape, parameter in transposed):
                return found
    return None


def matrices_in(name: str, packed: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield name, shape and packed mask of each matrix in a parameter: of a stack those of its slices."""
    if len(shape) < 3:
        yield name, shape, packed
        return
    for index in range(shape[0]):
        yield f"{name}.{index}", shape[1:], bits_between(packed, math.prod(shape[1:]), index)


def _broken_whole(name: str, packed: Tensor, shape: tuple[int, ...]) -> str | None:
    kept = count_bits(packed)
    return None if kept == math.prod(shape) else f"{kept} of {math.prod(shape)} weights in `{name}`, not all"


def _broken_together(
    pattern: Unstructured, packed: Mapping[str, Tensor], shapes: Shapes, whole: Container[str]
) -> str | None:
    num = kept = 0
    for parameter, mask in packed.items():
        for name, shape, bits in matrices_in(parameter, mask, shapes[parameter]):
            if name not in whole:
                num += math.prod(shape)
                kept += count_bits(bits)
    return None if kept == pattern.num_kept(num) else f"{kept} of all {num} weights, not {pattern.num_kept(num)}"


def _broken_experts(pattern: Experts, packed: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    for parameter, mask in packed.items():
        survivors = 0
        for name, shape, bits in matrices_in(parameter, mask, shapes[parameter]):
            kept = count_bits(bits)
            if kept not in (0, math.prod(shape)):
                return f"{kept} of {math.prod(shape)} weights in `{name}`, neither all nor none"
            survivors += kept > 0
        num = shapes[parameter][0]
        if survivors != pattern.num_kept(num):
            return f"{survivors} of {num} experts in `{parameter}`, not {pattern.num_kept(num)}"
    return None


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
