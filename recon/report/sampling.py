"""Sampling error of perplexities: how far they would move on other sequences of the same kind.

A row's loss is a mean over sequences of equal length, so the bootstrap over sequences has a closed form: the standard
deviation of the resampled mean is sqrt(sum of squared deviations) / n, without drawing any sample (Efron and
Tibshirani, 1993, section 5.3). Rows that were measured on the same sequences are compared sequence by sequence, for
most of what makes a sequence hard is hard for all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import fmean, stdev

from recon.report.groups import Group, Row
from recon.report.schema import Report
from recon.report.sections import Section, format_number


@dataclass(frozen=True)
class Sampled:
    """A mean over sequences, in nats per predicted token.

    Attributes:
        mean: Over sequences, and over seeds.
        error: Standard error over sequences.
        std: Sample standard deviation over seeds; None for one.
        num_sequences: Number of sequences.
    """

    mean: float
    error: float
    std: float | None
    num_sequences: int

    @property
    def text(self) -> str:
        """The mean and its standard error, signed."""
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def standard_error(values: Sequence[float]) -> float:
    """Standard deviation of the mean of `values` under the bootstrap."""
    mean = fmean(values)
    return sqrt(fsum((value - mean) ** 2 for value in values)) / len(values)


def loss_of(row: Row) -> Sampled | None:
    """Negative log-likelihood per token of a row; None where no cell has that of each sequence."""
    return _sampled([losses for cell in row.measured if (losses := _by_sequence(cell))])


def perplexity_error(row: Row) -> float | None:
    """Standard error of a row's perplexity over sequences, to first order; None if unknown."""
    loss, perplexity = loss_of(row), row.estimate("perplexity")
    return None if loss is None or perplexity is None else perplexity.mean * loss.error


def difference(row: Row, other: Row) -> Sampled | None:
    """Loss of `row` minus that of `other`, sequence by sequence and seed by seed; None if they do not share any."""
    others = {cell.seed: cell for cell in other.measured}
    pairs = [(cell, others[cell.seed]) for cell in row.measured if cell.seed in others]
    found = []
    for one, two in pairs:
        losses, reference = _by_sequence(one), _by_sequence(two)
        if one.protocol == two.protocol and losses and len(losses) == len(reference):
            found.append([a - b for a, b in zip(losses, reference, strict=True)])
    return _sampled(found)


def references_of(group: Group) -> list[Row]:
    """The rows that others are compared with: the dense model, and the best recovery."""
    dense = [row for row in group.rows if row.scope == "dense"][:1]
    return dense + ([best] if (best := best_recovery(group)) else [])


def best_recovery(group: Group) -> Row | None:
    """The recovered row with the lowest perplexity; None without one."""
    measured = [
        (value.mean, index, row)
        for index, row in enumerate(group.rows)
        if row.is_recovery and (value := row.estimate("perplexity")) is not None
    ]
    return min(measured)[2] if measured else None


def sampling_section(group: Group) -> Section | None:
    """The table of a group: loss, and its distance to the dense model and to the best; None if nothing is known."""
    rows = [(row, loss) for row in group.rows if (loss := loss_of(row)) is not None]
    if not rows:
        return None
    compared = references_of(group)
    lines = []
    for row, loss in rows:
        error = perplexity_error(row)
        shown = [f"{loss.mean:.4f} ± {loss.error:.4f}", "-" if error is None else format_number(error, 2)]
        found = [None if row is other else difference(row, other) for other in compared]
        lines.append([row.label, *shown, *("-" if one is None else one.text for one in found)])
    header = ["scope", "loss (nats/token)", "error of perplexity", *(f"minus {row.label}" for row in compared)]
    notes = [
        f"±: standard error over {rows[0][1].num_sequences} {group.split} sequences, by the bootstrap; differences are "
        "of the same sequences and seeds"
    ]
    return Section("sampling error", header, lines, notes)


def sampling_note(group: Group) -> list[str]:
    """One line on the sampling error of a group's perplexities, and on its two best rows; none if nothing is known."""
    losses = [loss for row in group.rows if (loss := loss_of(row)) is not None]
    if not losses:
        return []
    percent = 100 * max(loss.error for loss in losses)
    text = f"Perplexities: ± {percent:.1f} % at most by sampling {losses[0].num_sequences} {group.split} sequences"
    best = best_recovery(group)
    rivals = [row for row in group.rows if row is not best and row.is_recovery]
    found = [(one.mean, row.label, one) for row in rivals if best is not None and (one := difference(row, best))]
    if best is None or not found:
        return [text]
    _, label, closest = min(found, key=lambda one: one[:2])
    return [f"{text}; on the same ones {label} minus {best.label} is {closest.text} nats per token"]


def _by_sequence(cell: Report) -> list[float]:
    """Loss per token of each sequence; all are equally long."""
    losses = cell.losses.get("model", [])
    scored = cell.protocol.get("tokens_scored")
    return [loss * len(losses) / scored for loss in losses] if scored else []


def _sampled(found: Sequence[Sequence[float]]) -> Sampled | None:
    """Over seeds, each with a value for every sequence."""
    if not found or len({len(one) for one in found}) > 1:
        return None
    over_seeds = [fmean(values) for values in zip(*found, strict=True)]
    std = stdev(fmean(one) for one in found) if len(found) > 1 else None
    return Sampled(fmean(over_seeds), standard_error(over_seeds), std, len(over_seeds))
