"""Ctrl-C: a fit ends behind the step under way, as by SIGTERM; whatever else runs ends at once."""

import os
import signal
import sys
from types import FrameType

STATUS = 128 + signal.SIGINT


class Interrupt:
    """The handler of SIGINT for a command.

    Python raises KeyboardInterrupt between any two instructions, also where a logger's queue is locked: the fit would
    then wait for its logger without end. A second Ctrl-C ends the process: what a run has written survives that.
    """

    pressed = False

    def install(self) -> None:
        """Take the place of Python's own handler; one that ignores the signal, as `nohup` sets, stays."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Stop the fit by the handler of SIGTERM that it has set, or raise KeyboardInterrupt.

        Raises:
            KeyboardInterrupt: If no fit is under way.
        """
        if self.pressed:
            os._exit(STATUS)
        self.pressed = True
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop):
            raise KeyboardInterrupt
        stop(signal.SIGTERM, frame)


def told(command: str) -> int:
    """Say that Ctrl-C stopped a command; its exit status."""
    goes_on = "; the same command goes on from what it has written" if command in ("fit", "compare") else ""
    print(f"recon {command}: stopped by Ctrl-C{goes_on}", file=sys.stderr)
    return STATUS
