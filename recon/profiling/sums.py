"""Sums of live bytes over births and deaths of storages, and their peaks."""

from collections import Counter
from collections.abc import Iterable

from recon.profiling.entries import CATEGORIES, SIDES, Category, Entry, Peak, Side


def add_up(opening: Iterable[Entry], events: Iterable[Entry], peaks: dict[Side, Peak]) -> list[Entry]:
    """Add up events in order; update `peaks` where more is live than before.

    Args:
        opening: Entries that were live before.
        events: Each entry once for its birth, and once more for its death.
        peaks: Side -> largest peak so far.

    Returns:
        Entries that are live afterwards.
    """
    opening, events = list(opening), list(events)
    running: dict[Side, Counter[Category]] = {side: Counter() for side in SIDES}
    for entry in opening:
        running[entry.side][entry.category or "other"] += entry.nbytes
    totals = {side: sums.total() for side, sums in running.items()}
    for entry in events:
        side = entry.side
        entry.counted = not entry.counted
        change = entry.nbytes if entry.counted else -entry.nbytes
        running[side][entry.category or "other"] += change
        totals[side] += change
        if entry.counted and (side not in peaks or totals[side] > peaks[side].total):
            categories: dict[Category, int] = {name: running[side][name] for name in CATEGORIES}
            operation = None if entry.operation is None else str(entry.operation)
            peaks[side] = Peak(categories, entry.stage, round(entry.seconds, 3), operation)
    return list(dict.fromkeys(entry for entry in (*opening, *events) if entry.counted))
