"""The predicted needs of recipes, and the choice of one within limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from recon.basics.units import readable
from recon.planner.prediction import Prediction
from recon.report.sections import MISSING, Section, format_number


@dataclass(frozen=True)
class RecipeNeeds:
    """What a recipe needs, stage after stage.

    Args:
        name: Of the recipe.
        stages: Number of recoveries and the prediction of each stage.
    """

    name: str
    stages: Sequence[tuple[int, Prediction]]

    @property
    def peak(self) -> int:
        """Bytes of the largest stage on a device."""
        return max(prediction.peak.total for _, prediction in self.stages)

    @property
    def flops(self) -> int:
        """Operations of all stages."""
        return sum(number * prediction.flops for number, prediction in self.stages)

    @property
    def seconds(self) -> float | None:
        """Time of all recoveries; None without a speed."""
        known = [number * (prediction.seconds or 0.0) for number, prediction in self.stages if prediction.seconds]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def trains_whole(self) -> bool:
        """Whether a stage trains the whole model at once."""
        return any(prediction.options.scope == "full" for _, prediction in self.stages)

    def excess(self, memory: int | None, minutes: float | None) -> list[str]:
        """Say which limits the recipe exceeds.

        Args:
            memory: Bytes of a device; no limit if None.
            minutes: Likewise.
        """
        found = []
        if memory is not None and self.peak > memory:
            found.append(f"{readable(self.peak)} of {readable(memory)}")
        if minutes is not None and self.seconds is not None and self.seconds > 60 * minutes:
            found.append(f"{format_number(self.seconds / 60, 1)} of {format_number(minutes, 1)} minutes")
        return found

    def distance(self, memory: int | None, minutes: float | None) -> float:
        """The largest ratio of a need to its limit; 1 or less if the recipe fits."""
        ratios = [] if memory is None else [self.peak / memory]
        if minutes is not None and self.seconds is not None:
            ratios.append(self.seconds / (60 * minutes))
        return max(ratios, default=0.0)


def choose(known: Sequence[RecipeNeeds], memory: int | None, minutes: float | None) -> tuple[RecipeNeeds, str]:
    """Take the first recipe that fits.

    Args:
        known: Recipes, the best first.
        memory: Bytes of a device; no limit if None.
        minutes: Time of all recoveries; no limit if None.

    Returns:
        The recipe, and why it was taken.

    Raises:
        ValueError: If none fits, with the nearest ones and what they need.
    """
    refused = []
    for one in known:
        if not (excess := one.excess(memory, minutes)):
            better = "; ".join(refused)
            return one, f"{one.name}: {_needs(one)}" + (f"; better ones need more: {better}" if better else "")
        refused.append(f"{one.name} {' and '.join(excess)}")
    limits = [] if memory is None else [readable(memory)]
    limits += [] if minutes is None else [f"{format_number(minutes, 1)} minutes"]
    nearest = sorted(known, key=lambda one: one.distance(memory, minutes))[:3]
    shown = "; ".join(f"{one.name} {' and '.join(one.excess(memory, minutes))}" for one in nearest)
    raise ValueError(
        f"a recipe needs to fit in {' and '.join(limits)}, got none of {len(known)} that does, the nearest: {shown}; "
        f"raise the limits, or change options: see `recon plan`"
    )


def _needs(one: RecipeNeeds) -> str:
    time = "" if one.seconds is None else f", {format_number(one.seconds / 60, 1)} minutes"
    return f"{readable(one.peak)}{time} predicted"


def needs_section(known: Sequence[RecipeNeeds]) -> Section:
    """A table of recipes, the best first."""
    rows = [
        [
            one.name,
            " + ".join(
                f"{number} x {two.options.scope}" if number > 1 else two.options.scope for number, two in one.stages
            ),
            readable(one.peak),
            f"{one.flops:.1e}",
            MISSING if one.seconds is None else format_number(one.seconds / 60, 1),
            "yes" if one.trains_whole else "no",
        ]
        for one in known
    ]
    header = ["recipe", "stages", "peak", "FLOPs", "minutes", "trains the whole model"]
    return Section("recipes, the best first", header, rows, [], num_text=2)
