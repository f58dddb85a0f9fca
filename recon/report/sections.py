"""Tables as strings, before a terminal or a markdown page renders them, and how numbers look in them."""

from dataclasses import dataclass

from recon.report.estimates import Estimate

MISSING = "-"

FLOP_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
"""Name and size, the largest first."""

WIDEST = 1000
"""Characters: no table needs more."""


@dataclass(frozen=True)
class Section:
    """One table as strings, in which columns of numbers follow columns of text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    num_text: int = 1
    """Columns of text."""


def show(value: Estimate | None, *, scale: float = 1.0, decimals: int = 1, spread: bool = False) -> str:
    """The mean of `value` times `scale`, with its deviation if `spread` and there is one."""
    if value is None:
        return MISSING
    text = format_number(value.mean * scale, decimals)
    if spread and value.std is not None:
        text += f" ± {format_number(value.std * scale, decimals)}"
    return text


def flop_unit(most: float | int) -> tuple[str, float]:
    """One unit for all numbers of operations: its name and size, for the largest of them."""
    return next((one for one in FLOP_UNITS if most >= one[1]), FLOP_UNITS[-1])


def format_number(value: float, decimals: int) -> str:
    """`value` with so many decimals; from 1,000 on without, from ten million on as a power of ten."""
    if abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.{0 if abs(value) >= 1000 else decimals}f}"
