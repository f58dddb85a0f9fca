"""Transfers between host and device, and waits of the host for the device, by the function that causes them."""

import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import recon

Direction = Literal["to device", "to host"]
BASE = f"{Path(recon.__file__).parent.parent}/"
ROOTS = f"{BASE}recon/", f"{BASE}callbacks/"
MAX_FRAMES = 80


class Counts:
    """What a program has asked of the device since it was made.

    A place is the innermost function of recon under way, such as `recon/scopes/base.py log_loss`; without one it is
    the innermost function of all.

    Attributes:
        waits: (place, cause) -> how often the host waited for the device.
        transfers: (direction, place) -> number of transfers.
        bytes: (direction, place) -> their bytes.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.transfers: Counter[tuple[Direction, str]] = Counter()
        self.bytes: Counter[tuple[Direction, str]] = Counter()

    def wait(self, cause: str) -> None:
        """Note that the host waits for the device."""
        self.waits[place(), cause] += 1

    def transfer(self, direction: Direction, num_bytes: int, waits: bool) -> None:
        """Note a transfer; from or to pageable memory the host waits for it."""
        where = place()
        self.transfers[direction, where] += 1
        self.bytes[direction, where] += num_bytes
        if waits:
            self.waits[where, f"transfer {direction}"] += 1

    def copy(self) -> "Counts":
        """The counts so far."""
        other = Counts()
        other.waits, other.transfers, other.bytes = self.waits.copy(), self.transfers.copy(), self.bytes.copy()
        return other

    def since(self, earlier: "Counts") -> "Counts":
        """The counts after `earlier` was copied."""
        other = Counts()
        other.waits, other.transfers = self.waits - earlier.waits, self.transfers - earlier.transfers
        other.bytes = self.bytes - earlier.bytes
        return other

    def total(self, direction: Direction, part: str = "") -> int:
        """Bytes in one direction, caused by places whose name contains `part`."""
        return sum(size for (way, where), size in self.bytes.items() if way == direction and part in where)


def place() -> str:
    """The innermost function of recon on the stack, or else the innermost outside the simulation."""
    frame, outermost = sys._getframe(1), ""
    for _ in range(MAX_FRAMES):
        if frame is None:
            break
        code = frame.f_code
        if code.co_filename.startswith(ROOTS) and "jaxtyping" not in code.co_filename:
            return f"{code.co_filename.removeprefix(BASE)} {code.co_name}"
        if not outermost and "/simulated/" not in code.co_filename and "/torch/" not in code.co_filename:
            outermost = f"{code.co_filename} {code.co_name}"
        frame = frame.f_back
    return outermost
