"""What `memory.json` says of recovery: the largest figures over its phases."""

from collections.abc import Mapping, Sequence
from typing import Any

from recon.profiling.phases import PhaseName

NOT_RECOVERY = (PhaseName.PRUNE, PhaseName.BASELINES, PhaseName.EVALUATE, PhaseName.DRIFT)
"""Phases that cost the same whatever the scope; a report's peaks leave them out."""

NOT_FORESEEN = (*NOT_RECOVERY, PhaseName.LOAD, PhaseName.SAVE)
"""Phases that a prediction does not speak of."""


def peaks_of(memory: Mapping[str, Any] | None) -> dict[str, Any]:
    """The peaks of one process, as a report names them; `tracked` are those of live tensors by category, per side."""
    memory = memory or {"phases": [], "baseline_host_bytes": None}
    phases = [phase for phase in memory["phases"] if phase["phase"] not in NOT_RECOVERY]
    splits = [phase["split"] for phase in phases if phase.get("split")]
    return {
        "peak_host_bytes": largest(phases, "host_bytes"),
        "peak_device_bytes": largest(phases, "device_allocated_bytes"),
        "baseline_host_bytes": memory["baseline_host_bytes"],
        **{
            name: largest(splits, name)
            for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "on_host_bytes")
        },
        "tracked": _tracked([phase for phase in phases if phase["phase"] not in NOT_FORESEEN]),
    }


def largest(rows: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """The largest value under `name`; None if there is none."""
    values = [row[name] for row in rows if row[name] is not None]
    return max(values) if values else None


def _tracked(phases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Side -> bytes of each category when they were most together."""
    found: dict[str, dict[str, int]] = {}
    for phase in phases:
        for side, categories in (phase.get("categories") or {}).items():
            if sum(categories.values()) > sum(found.get(side, {}).values()):
                found[side] = categories
    return found
