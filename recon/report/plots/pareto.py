"""Which scopes are worth their price: the Pareto front, and its pictures on disk."""

import re
from pathlib import Path

from recon.report.groups import Group
from recon.report.schema import Results

PNG_DPI = 150


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The distinct (cost, perplexity) points that no other point beats, by rising cost; less is better."""
    front: list[tuple[float, float]] = []
    for cost, perplexity in sorted(set(points)):
        if not front or perplexity < front[-1][1]:
            front.append((cost, perplexity))
    return front


def draw_pareto(results: Results, directory: Path | str) -> list[Path]:
    """Draw perplexity against peak memory and against recovery time, one picture per comparable group.

    Args:
        results: What was measured. Several seeds become one point with error bars (sample standard
            deviation); failed cells are left out and named in a footnote.
        directory: Where `pareto.png` and `pareto.svg` go; with several groups of model, criterion and
            pattern `pareto-<group>.png` and `.svg`. It is created if needed; equal results make equal files.

    Returns:
        The files written. A group in which no recovery was measured has none.
    """
    # matplotlib costs a second and 50 MiB that only this function should pay
    from recon.report.plots.picture import draw_group, draw_groups

    return draw_groups(results, Path(directory), "pareto", draw_group)


def stems(kind: str, groups: list[Group]) -> list[str]:
    """File names of pictures of one `kind` without suffix, one per group and all different."""
    if len(groups) == 1:
        return [kind]
    names: list[str] = []
    for group in groups:
        words = f"{group.model} {group.criterion} {group.pattern}".lower()
        stem = f"{kind}-" + re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")
        num_same = sum(re.fullmatch(re.escape(stem) + r"(-\d+)?", other) is not None for other in names)
        names.append(f"{stem}-{num_same + 1}" if num_same else stem)
    return names
