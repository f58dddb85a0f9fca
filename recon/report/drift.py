"""Drift from the dense model as rows: error of the hidden state against depth, and KL per token.

The table and the picture (`recon.report.plots.drift`) share these curves.
"""

from dataclasses import dataclass

from recon.report.estimates import Estimate, estimate
from recon.report.groups import Group, Row
from recon.report.schema import Report
from recon.report.sections import MISSING, Section, show

MOST_COLUMNS = 8
"""Columns of blocks in a table; of a deeper model they are evenly spaced blocks."""


@dataclass(frozen=True)
class Curve:
    """Drift of one row, over its seeds.

    Attributes:
        scope: Of the row; likewise `label`.
        label: What tables and pictures call it.
        hidden: Relative squared error of the hidden state after each block; None where nothing was measured.
        kl: KL(dense || row) in nats per predicted token.
    """

    scope: str
    label: str
    hidden: list[Estimate | None]
    kl: Estimate | None


def curves(group: Group) -> list[Curve]:
    """One curve for each row of `group` whose drift was measured."""
    return [_curve(row) for row in group.rows if any(cell.drift for cell in row.measured)]


def protocol(group: Group) -> str:
    """What drift was measured on, e.g. "16 validation sequences of 256 tokens"."""
    texts = [
        f"{cell.drift.get('num_sequences')} {cell.drift.get('split')} sequences of {cell.drift.get('seq_len')} tokens"
        for cell in _measured(group)
    ]
    return ", ".join(dict.fromkeys(texts))


def split(group: Group) -> str:
    """The split that drift was measured on."""
    return "/".join(sorted({str(cell.drift.get("split")) for cell in _measured(group)}))


def drift_section(group: Group) -> Section | None:
    """The table of a group: KL per token, then the error after some blocks; None if nothing was measured."""
    rows = curves(group)
    if not rows:
        return None
    depth = max(len(curve.hidden) for curve in rows)
    shown = evenly_spaced(depth, MOST_COLUMNS)

    def strings(curve: Curve) -> list[str]:
        errors = [curve.hidden[i] if i < len(curve.hidden) else None for i in shown]
        return [curve.label, show(curve.kl, decimals=4, spread=True), *map(percent, errors)]

    notes = [
        f"block k: ||h - h_dense||^2 / ||h_dense||^2, h being what block k of 0 to {depth - 1} returns",
        f"KL: KL(dense || row), mean over predicted tokens; both on {protocol(group)}",
    ]
    header = ["scope", "KL (nats/token)", *(f"block {i}" for i in shown)]
    return Section("drift: relative squared error of the hidden state (%)", header, list(map(strings, rows)), notes)


def evenly_spaced(depth: int, most: int) -> list[int]:
    """At most `most` (two or more) indices of 0 to `depth` - 1, the first and the last among them."""
    if depth <= most:
        return list(range(depth))
    return [round(i * (depth - 1) / (most - 1)) for i in range(most)]


def percent(error: Estimate | None) -> str:
    """The mean in percent with three digits; from 100 % on rounded, as a power of ten where that is shorter."""
    if error is None:
        return MISSING
    value = error.mean * 100
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _curve(row: Row) -> Curve:
    measured = [cell.drift for cell in row.measured if cell.drift]
    depth = max(len(drift["hidden"]) for drift in measured)
    hidden = [estimate(drift["hidden"][i] for drift in measured if i < len(drift["hidden"])) for i in range(depth)]
    return Curve(row.scope, row.label, hidden, estimate(drift["kl"] for drift in measured))


def _measured(group: Group) -> list[Report]:
    return [cell for row in group.rows for cell in row.measured if cell.drift]
