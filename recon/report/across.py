"""What several groups have in common: one table over all of them, of each quantity that a study asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recon.report.groups import Group, Row
from recon.report.paired import best_two
from recon.report.sections import MISSING, Section, flop_unit, show

AXES = ("text", "pattern", "model", "criterion")
"""Attributes of a group."""


@dataclass(frozen=True)
class Line:
    """The places of one axis, all else being equal.

    Attributes:
        name: What all else is; empty if nothing else differs.
        groups: Place on the axis -> its group.
    """

    name: str
    groups: dict[str, Group]


def differing(groups: Sequence[Group]) -> list[str]:
    """The axes along which groups differ, that with most places first."""
    places = {axis: len({getattr(group, axis) for group in groups}) for axis in AXES}
    return sorted((axis for axis in AXES if places[axis] > 1), key=lambda axis: -places[axis])


def lines_along(axis: str, groups: Sequence[Group]) -> list[Line]:
    """The groups, line by line, in order of appearance.

    Args:
        axis: One of `AXES`.
        groups: In which no two have the same place on all axes.
    """
    rest = [other for other in differing(groups) if other != axis]
    lines: dict[str, Line] = {}
    for group in groups:
        name = ", ".join(str(getattr(group, other)) for other in rest)
        lines.setdefault(name, Line(name, {})).groups[getattr(group, axis)] = group
    return list(lines.values())


def across_sections(groups: Sequence[Group]) -> list[Section]:
    """Perplexity, operations, and the two best recoveries of each group, a row per group; none for a single group."""
    if len(groups) < 2:
        return []
    labels = list(dict.fromkeys(row.label for group in groups for row in group.rows))
    recoveries = list(dict.fromkeys(row.label for group in groups for row in group.rows if row.is_recovery))
    name, size = flop_unit(max((cell.flops or 0 for group in groups for cell in group.cells), default=0))
    splits = "/".join(dict.fromkeys(group.split for group in groups))
    found = [
        _table(f"{splits} perplexity of all groups", groups, labels, _quantity("perplexity", decimals=2, spread=True)),
        _table(f"{name} of all groups", groups, recoveries, _quantity("flops", scale=1 / size, decimals=2)),
        _best(groups),
    ]
    return [section for section in found if any(set(row[section.num_text :]) - {MISSING} for row in section.rows)]


def _quantity(name: str, **options: object) -> Callable[[Row], str]:
    return lambda row: show(row.estimate(name), **options)  # pyright: ignore[reportArgumentType]


def _table(title: str, groups: Sequence[Group], labels: Sequence[str], shown: Callable[[Row], str]) -> Section:
    axes = differing(groups)
    rows = []
    for group in groups:
        own = {row.label: shown(row) for row in group.rows}
        rows.append([*(getattr(group, axis) for axis in axes), *(own.get(label, MISSING) for label in labels)])
    return Section(title, [*axes, *labels], rows, [], num_text=len(axes))


def _best(groups: Sequence[Group]) -> Section:
    """The best recovery of each group, and how far the second is behind."""
    axes = differing(groups)
    rows = []
    for group in groups:
        if (found := best_two(group)) is not None:
            best, second, one = found
            names = [getattr(group, axis) for axis in axes]
            rows.append([*names, best.label, second.label, f"{one.mean:+.4f}", one.shown])
    header = [*axes, "best", "second", "second minus best (nats/token)", "interval (95%)"]
    notes = ["Differences of losses, seed by seed; Student's interval of their mean"] if rows else []
    return Section("the best of each group", header, rows, notes, num_text=len(axes) + 2)
