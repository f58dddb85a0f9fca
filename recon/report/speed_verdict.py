"""Whether sparsity pays: each storage against dense over the whole model, and the sentence that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recon.report.speed import DENSE, Product, Speed, Stored

Outcome = Literal["faster", "equal", "slower"]

WORDS: dict[Outcome, str] = {
    "faster": "faster than dense",
    "equal": "as fast as dense within the spread",
    "slower": "slower than dense",
}


@dataclass(frozen=True)
class Gain:
    """One storage against dense, over all matrices that were timed in both.

    Args:
        tokens: Rows of the inputs.
        count: Number of these matrices.
        seconds: Of the storage, the sum of medians.
        speed: Seconds of dense over those of the storage.
        outcome: "equal" if the ranges between the sums of quartiles overlap.
    """

    tokens: int
    count: int
    seconds: float
    speed: float
    outcome: Outcome


def verdict(speed: Speed) -> str:
    """Whether sparsity pays on this device, in a sentence."""
    threads = speed.environment["threads"]
    where = f"On {speed.environment['device']} ({threads} thread{'' if threads == 1 else 's'}),"
    zeros = f"{100 * speed.sparsity:.3g} % zeros ({speed.pattern}, {speed.dtype})"
    found = {name: gains(speed, name) for name in speed.storages if name != DENSE}
    found = {name: some for name, some in found.items() if some}
    if not found:
        return f"{where} no storage of {zeros} could be compared with dense."
    is_faster = any(one.outcome == "faster" for some in found.values() for one in some)
    clauses = [
        f"{name} is {_said(some)}{_where(speed, some)}, with {ratio(_bytes(speed, name))} of its bytes"
        for name, some in found.items()
    ]
    return f"{where} {zeros} {'save time' if is_faster else 'save no time'}: {'; '.join(clauses)}."


def gains(speed: Speed, storage: str) -> list[Gain]:
    """A storage against dense, for each number of tokens; empty if no matrix was timed in both.

    Times are summed over all matrices of the model, those of one shape taken as the measured one.
    """
    pairs = _timed(speed, storage)
    number = sum(count for count, *_ in pairs)
    found = []
    for place, tokens in enumerate(speed.tokens if pairs else ()):
        ours = _sums([(count, one.products[place]) for count, one, _ in pairs])
        dense = _sums([(count, one.products[place]) for count, _, one in pairs])
        outcome: Outcome = "faster" if ours.high < dense.low else "slower" if ours.low > dense.high else "equal"
        found.append(Gain(tokens, number, ours.seconds, dense.seconds / ours.seconds, outcome))
    return found


@dataclass(frozen=True)
class _Sums:
    """Seconds over several matrices: sums of medians, and of first and third quartiles."""

    seconds: float
    low: float
    high: float


def _sums(products: Sequence[tuple[int, Product]]) -> _Sums:
    return _Sums(
        sum(count * one.seconds for count, one in products),
        sum(count * one.low for count, one in products),
        sum(count * one.high for count, one in products),
    )


def ratio(value: float) -> str:
    """`0.35x`: two digits, from ten on a whole number."""
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _timed(speed: Speed, storage: str) -> list[tuple[int, Stored, Stored]]:
    """Number of matrices, record of the storage and record of dense, for the shapes that were timed in both."""
    pairs = [(matrix.count, matrix.of(storage), matrix.of(DENSE)) for matrix in speed.matrices]
    return [one for one in pairs if one[1].status == one[2].status == "timed"]


def _bytes(speed: Speed, storage: str) -> float:
    """Bytes of a storage over those of dense."""
    pairs = _timed(speed, storage)
    ours = sum(count * (one.num_bytes or 0) for count, one, _ in pairs)
    return ours / sum(count * (one.num_bytes or 0) for count, _, one in pairs)


def _where(speed: Speed, found: Sequence[Gain]) -> str:
    """` in 1 of 4 matrices`, if not all were timed."""
    number, count = speed.num_matrices, found[0].count
    return "" if count == number else f" in {count} of {number} matrices"


def _said(found: Sequence[Gain]) -> str:
    """`slower than dense at every batch (0.2x to 0.7x)`, or each outcome with its batches."""
    parts = []
    for outcome, words in WORDS.items():
        here = [one for one in found if one.outcome == outcome]
        if not here:
            continue
        sizes = [f"{one.tokens:,}" for one in here]
        at = f"{listed(sizes)} token{'' if sizes == ['1'] else 's'}"
        slowest, fastest = ratio(min(one.speed for one in here)), ratio(max(one.speed for one in here))
        speeds = slowest if slowest == fastest else f"{slowest} to {fastest}"
        parts.append(f"{words} at {'every batch' if len(here) == len(found) else at} ({speeds})")
    return listed(parts)
