"""What a comparison tried to choose options, as a table beside that of the results."""

import json
from collections.abc import Mapping
from typing import Any

from recon.report.estimates import Estimate
from recon.report.groups import REASON_LENGTH, Group
from recon.report.schema import Report
from recon.report.sections import MISSING, Section, show


def tuning_section(group: Group) -> Section | None:
    """Every point tried for the rows of a group, and the choice; None if none of them was tuned."""
    tuned = [row.cells[0] for row in group.rows if row.cells[0].tuning]
    if not tuned:
        return None
    rows, notes = [], []
    for cell in tuned:
        for i, point in enumerate(cell.tuning):
            rows.append(
                [
                    cell.label if i == 0 else "",
                    brief(point["options"]),
                    _shown(point["perplexity"], decimals=2),
                    _shown(point["seconds"], decimals=1),
                    "chosen" if point["chosen"] else "",
                ]
            )
        notes += _notes(cell)
    first = ", ".join(filter(None, (group.text, group.criterion, group.pattern)))
    notes.append(f"tuned on {first}, seed {tuned[0].seed}; each choice serves all texts, criteria, patterns and seeds")
    header = ["scope", "tried", "validation perplexity", "seconds", "choice"]
    return Section("tuning (validation perplexity)", header, rows, notes)


def brief(options: Mapping[str, Any]) -> str:
    """Options and values in few characters, e.g. `lr=6e-3 epochs=4`."""
    return " ".join(f"{name.removeprefix('model.')}={_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, float) or value == 0 or 0.1 <= abs(value) < 1e5:
        return json.dumps(value)
    digits, _, exponent = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _notes(cell: Report) -> list[str]:
    """Which points failed and why, and which choices lie at an end of what was tried."""
    notes = []
    for point in cell.tuning:
        if point["perplexity"] is None:
            reason = point["error"]
            reason = reason if len(reason) <= REASON_LENGTH else reason[: REASON_LENGTH - 3] + "..."
            notes.append(f"{cell.label} with {brief(point['options'])} is no candidate: {reason}")
    for chosen in (point["options"] for point in cell.tuning if point["chosen"]):
        for name, best in chosen.items():
            tried = {json.dumps(point["options"][name]): point["options"][name] for point in cell.tuning}.values()
            if (
                len(tried) < 2
                or not all(type(value) in (int, float) for value in tried)
                or min(tried) < best < max(tried)
            ):
                continue
            end = "largest" if best == max(tried) else "smallest"
            notes.append(f"{cell.label}: the best {name.removeprefix('model.')}, {_value(best)}, is the {end} tried")
    return notes


def _shown(value: float | None, decimals: int) -> str:
    return MISSING if value is None else show(Estimate(float(value), None), decimals=decimals)
