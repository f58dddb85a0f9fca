"""Amounts of memory as people write them: `24GiB`, `80GB`, `512 MiB`."""

import re

UNITS = {"B": 1, **{f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}}
UNITS |= {f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", start=1)}


def in_bytes(text: str) -> int:
    """The bytes that `text` means.

    Raises:
        ValueError: If it is not a positive number with a unit; a bare number could be anything.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in UNITS or not float(found[1]) > 0:
        raise ValueError(
            f"an amount of memory needs a positive number and one of the units {', '.join(UNITS)}, got {text!r}; "
            f"write for example 24GiB"
        )
    return round(float(found[1]) * UNITS[found[2]])


def readable(amount: int) -> str:
    """`amount` bytes with a unit and three digits or so: `13.5 GiB`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if amount >= UNITS[unit]:
            value = amount / UNITS[unit]
            return f"{value:,.{0 if value >= 100 else 1}f} {unit}"
    return f"{amount} B"
