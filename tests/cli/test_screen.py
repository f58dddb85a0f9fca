"""The cells of a comparison on a terminal, and in a pipe."""

import io
import logging

import pytest
from rich.console import Console

from recon.cli.screen import Screen, screen
from recon.experiment.comparison.cell import of_cell

log = logging.getLogger("recon")


def terminal(height: int = 10) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=40, height=height, highlight=False, markup=False)


def rows(shown: Screen) -> list[str]:
    """What the screen shows at the moment."""
    console = terminal()
    console.print(shown.live.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def said(shown: Screen, level: int, text: str, **extra: object) -> None:
    shown.handle(logging.makeLogRecord({"levelno": level, "msg": text} | extra))


def test_each_cell_under_way_has_a_row_with_its_last_line() -> None:
    console = terminal()
    shown = Screen(console)
    assert isinstance(console.file, io.StringIO)
    said(shown, logging.INFO, "lr=1e-3 chosen")
    said(shown, logging.INFO, "[1/3 a] begins", **of_cell("[1/3 a]"))
    said(shown, logging.INFO, "[2/3 b] window 1/4", **of_cell("[2/3 b]"))
    said(shown, logging.INFO, "[2/3 b] window 2/4 of a line that is too long for it", **of_cell("[2/3 b]"))
    assert console.file.getvalue() == "lr=1e-3 chosen\n"
    assert rows(shown) == ["[1/3 a] begins", "[2/3 b] window 2/4 of a line that is to…"]
    said(shown, logging.WARNING, "[1/3 a] was killed", **of_cell("[1/3 a]"))
    said(shown, logging.DEBUG, "[2/3 b] ended", **of_cell("[2/3 b]", True))
    assert console.file.getvalue() == "lr=1e-3 chosen\n[1/3 a] was killed\n[2/3 b] ended\n"
    assert rows(shown) == ["[1/3 a] was killed"]


def test_the_screen_takes_the_place_of_other_handlers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    console, printed = terminal(), logging.StreamHandler(io.StringIO())
    assert isinstance(console.file, io.StringIO)
    caplog.set_level(logging.INFO, "recon")
    monkeypatch.setattr(log, "handlers", [printed])
    with screen(console):
        log.info("[1/1 a] begins", extra=of_cell("[1/1 a]"))
        log.debug("[1/1 a] ended", extra=of_cell("[1/1 a]", True))
    assert printed.stream.getvalue() == ""
    assert "[1/1 a] ended\n" in console.file.getvalue()
    log.info("[1/1 b] begins", extra=of_cell("[1/1 b]"))
    log.debug("[1/1 b] ended", extra=of_cell("[1/1 b]", True))
    assert printed.stream.getvalue() == "[1/1 b] begins\n"
