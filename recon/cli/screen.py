"""The cells of a comparison on a terminal: a row for each that is under way, below the lines that stay."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text


class Screen(logging.Handler):
    """Shows the last line of each cell under way, and prints what is of no cell, warnings, and the end of each cell.

    A record is of the cell that its `cell` names; `has_ended` is true in the last one.

    Args:
        console: A terminal.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._rows: dict[str, str] = {}
        self.live = Live(console=console, transient=True, get_renderable=self._shown, vertical_overflow="ellipsis")

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, or show it in its cell's row."""
        cell, text = getattr(record, "cell", None), self.format(record)
        has_ended = getattr(record, "has_ended", False)
        if cell is None or has_ended or record.levelno >= logging.WARNING:
            self.live.console.print(text)
        if cell is not None and has_ended:
            self._rows.pop(cell, None)
        elif cell is not None:
            self._rows[cell] = text.removeprefix(cell).strip()

    def _shown(self) -> Group:
        rows = [f"{cell} {text}" for cell, text in list(self._rows.items())]
        return Group(*(Text(row, no_wrap=True, overflow="ellipsis") for row in rows))


@contextmanager
def screen(console: Console) -> Iterator[None]:
    """Show what recon logs on a screen until the context ends, in place of its other handlers.

    Args:
        console: A terminal.
    """
    logger, shown = logging.getLogger("recon"), Screen(console)
    others, level = logger.handlers[:], logger.level
    logger.handlers[:] = [shown]
    logger.setLevel(logging.DEBUG)  # the ends of cells: without a screen their last lines tell them
    try:
        with shown.live:
            yield
    finally:
        logger.handlers[:] = others
        logger.setLevel(level)
