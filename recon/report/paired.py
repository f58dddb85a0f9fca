"""Differences between rows over seeds, with 95 % intervals: what another seed might have shown.

Rows of one seed share masks, calibration and test sequences. Their losses are subtracted seed by seed, so that what is
common to both leaves the difference. The interval is Student's, mean ± t s / sqrt(n), for n seeds and n - 1 degrees of
freedom. `recon.report.sampling` has the other error, that of the choice of test sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from recon.report.groups import Group, Row, group_cells
from recon.report.sampling import best_recovery
from recon.report.schema import Results
from recon.report.sections import MISSING, Section

LEVEL = 0.95
"""Confidence of an interval."""


@dataclass(frozen=True)
class Paired:
    """A difference of losses over seeds, in nats per predicted token.

    Attributes:
        values: Of each seed.
        seeds: The seeds, in the order of `values`.
    """

    values: Sequence[float]
    seeds: Sequence[int]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval of the mean; None for a single seed."""
        num = len(self.values)
        if num < 2:
            return None
        reach = float(stdtrit(num - 1, (1 + LEVEL) / 2)) * stdev(self.values) / sqrt(num)
        return self.mean - reach, self.mean + reach

    @property
    def is_resolved(self) -> bool:
        """Whether there is an interval, and 0 is outside."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def shown(self) -> str:
        """The interval, signed."""
        return MISSING if self.interval is None else "{:+.4f} to {:+.4f}".format(*self.interval)


def paired(row: Row, other: Row) -> Paired | None:
    """Log perplexity of `row` minus that of `other`, seed by seed; None if they share no seed and protocol."""
    others = {cell.seed: cell for cell in other.of_seeds}
    values, seeds = [], []
    for one in row.of_seeds:
        two = others.get(one.seed)
        if two is None or one.perplexity is None or two.perplexity is None or one.protocol != two.protocol:
            continue
        values.append(log(one.perplexity / two.perplexity))
        seeds.append(one.seed)
    return Paired(values, seeds) if values else None


def differences(results: Results) -> list[dict[str, Any]]:
    """The differences of each two recoveries of a group, as plain data.

    Returns:
        One mapping for each two rows that share a seed: the group's `model`, `text`, `criterion` and `pattern`, the
        labels `row` and `minus`, the `seeds`, the `mean` in nats per predicted token, and the ends of its 95 %
        interval, `low` and `high`, None for a single seed.
    """
    found = []
    for group in group_cells(results):
        told = {name: getattr(group, name) for name in ("model", "text", "criterion", "pattern")}
        for other, row in combinations([row for row in group.rows if row.is_recovery], 2):
            if (one := paired(row, other)) is not None:
                low, high = one.interval or (None, None)
                measured = {"seeds": list(one.seeds), "mean": one.mean, "low": low, "high": high}
                found.append({**told, "row": row.label, "minus": other.label, **measured})
    return found


def paired_section(group: Group) -> Section | None:
    """The table of a group: each recovery against the best one; None without two seeds."""
    best = best_recovery(group)
    if best is None:
        return None
    rows = [(row, one) for row in group.rows if row is not best and row.is_recovery and (one := paired(row, best))]
    if all(one.interval is None for _, one in rows):
        return None
    lines = [[row.label, f"{one.mean:+.4f}", one.shown, ", ".join(map(str, one.seeds))] for row, one in rows]
    header = ["scope", f"minus {best.label} (nats/token)", "interval (95%)", "seeds"]
    notes = ["Differences of losses, seed by seed; Student's interval of their mean"]
    return Section("differences over seeds", header, lines, notes)


def best_two(group: Group) -> tuple[Row, Row, Paired] | None:
    """The best recovery, the second, and the second's difference from it; None if they share no seed and protocol."""
    best = best_recovery(group)
    second = None if best is None else best_recovery(group, best)
    one = None if best is None or second is None else paired(second, best)
    return None if best is None or second is None or one is None else (best, second, one)


def ranking_note(group: Group) -> list[str]:
    """A warning where the order of the two best recoveries is within noise, or cannot be told from it."""
    found = best_two(group)
    if found is None or found[2].is_resolved:
        return []
    best, second, one = found
    if one.interval is None:
        return [
            f"The order of {best.label} and {second.label} rests on one seed: with seeds such as [0, 1, 2] differences "
            f"have intervals"
        ]
    return [
        f"The order of {best.label} and {second.label} is within noise: their difference, {one.shown} nats per token "
        f"(95 % over {len(one.seeds)} seeds), may be 0"
    ]
