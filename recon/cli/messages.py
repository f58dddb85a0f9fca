"""The lines that recon logs, printed for the user of a command."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class PrintedLines(logging.Handler):
    """Prints the bare message on standard output; nothing in processes other than the first of a run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        from recon.distributed.ranks import rank  # imports Lightning, which `recon --help` does without

        if rank() == 0:
            Console(highlight=False, soft_wrap=True, markup=False).print(self.format(record))


@contextmanager
def printed_messages() -> Iterator[None]:
    """Print what recon logs until the context ends."""
    logger, handler = logging.getLogger("recon"), PrintedLines()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
