"""Tables of a markdown page."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], lines: Sequence[Sequence[str]], num_text: int) -> str:
    """A markdown table; columns behind the first `num_text` are numbers, aligned right."""
    rule = [":--"] * num_text + ["--:"] * (len(header) - num_text)
    return "\n".join(_row(one) for one in (header, rule, *lines))


def rows(name: str, value: str, content: Mapping[str, Any]) -> str:
    """A markdown table of two columns, each value as code."""
    return table([name, value], [[key, f"`{one_line(str(one))}`"] for key, one in content.items()], num_text=2)


def one_line(text: str) -> str:
    """A text as it may stand between other words, or as code between backticks."""
    return " ".join(text.replace("`", "'").split())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
