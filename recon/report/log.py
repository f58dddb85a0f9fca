"""The log of a run: everything that recon says, in a file of the run's directory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what the logger "recon" is told to `path` until the context ends; each start begins with its date.

    An error that ends the context is logged too, for the terminal that shows it may be gone.

    Args:
        path: The file; missing directories are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logger, handler = logging.getLogger("recon"), logging.FileHandler(path, encoding="utf-8")
    level, propagates, upwards = logger.level, logger.propagate, _Upwards(logger.getEffectiveLevel())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    if propagates:
        logger.propagate = False
        logger.addHandler(upwards)
    note(handler, f"--- {datetime.now(UTC).isoformat(timespec='seconds')}")
    try:
        yield
    except BaseException as error:
        note(handler, f"{type(error).__name__}: {error}")
        raise
    finally:
        for one in (handler, upwards):
            logger.removeHandler(one)
            one.close()
        logger.setLevel(level)
        logger.propagate = propagates


class _Upwards(logging.Handler):
    """Hands records to the handlers of the root, from the level on that the caller has set: the file has more."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on one record."""
        logging.getLogger().callHandlers(record)


def note(handler: logging.Handler, line: str) -> None:
    """Give one line to one handler alone."""
    handler.emit(logging.LogRecord("recon", logging.INFO, __file__, 0, line, None, None))
