"""Perplexity against cost: the measure of memory that rows are compared by, and the Pareto front."""

from recon.report.groups import Group
from recon.report.looks import LOOKS

MEMORY = {
    "tracked_device_bytes": "peak device memory, live tensors",
    "peak_device_bytes": "peak device memory, allocated",
    "peak_host_bytes": "peak host memory",
}
"""Measures of memory -> their names; first the one in which scopes differ most."""


def memory_axis(group: Group) -> tuple[str, str]:
    """The quantity that memory is compared by, the device's live tensors where they were measured, and its name."""
    for quantity, name in MEMORY.items():
        if any(getattr(cell, quantity) is not None for cell in group.cells if cell.scope in LOOKS):
            return quantity, name
    return "peak_host_bytes", MEMORY["peak_host_bytes"]


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The distinct (cost, perplexity) points that no other point beats, by rising cost; less is better."""
    front: list[tuple[float, float]] = []
    for cost, perplexity in sorted(set(points)):
        if not front or perplexity < front[-1][1]:
            front.append((cost, perplexity))
    return front
