"""Curves that the loggers of a run have written: TensorBoard's events, or metrics.csv."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("loss", "held_out_error", "held_out_loss")
"""The last part of a curve's name, of those that the page shows."""

MOST = 600
"""Points of a curve; a longer one is thinned evenly."""


@dataclass
class Curve:
    """Values against the optimizer step."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def thinned(self) -> "Curve":
        """The curve with `MOST` points at most, the last among them."""
        every = -(-len(self.steps) // MOST)
        return Curve(self.steps[::-1][::every][::-1], self.values[::-1][::every][::-1])


def read_curves(logs: Path) -> dict[str, Curve]:
    """The curves below `logs`, of all starts of the run; none if no logger wrote there.

    Args:
        logs: The directory of a run's loggers.
    """
    found = _of_events(logs) if any(logs.rglob("events.out.tfevents.*")) else _of_tables(logs)
    return {name: curve.thinned for name, curve in found.items() if curve.steps}


def _of_events(logs: Path) -> Mapping[str, Curve]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # half a second

    found: dict[str, Curve] = {}
    for directory in sorted({path.parent for path in logs.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if (name := tag.rpartition("/")[2]) in NAMES:
                curve = found.setdefault(name, Curve())
                curve.steps += [event.step for event in events.Scalars(tag)]
                curve.values += [event.value for event in events.Scalars(tag)]
    return found


def _of_tables(logs: Path) -> Mapping[str, Curve]:
    found = {name: Curve() for name in NAMES}
    for file in sorted(logs.rglob("metrics.csv")):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name in NAMES:
                    if row.get(name) and row.get("step"):
                        found[name].steps.append(int(row["step"]))
                        found[name].values.append(float(row[name]))
    return found
