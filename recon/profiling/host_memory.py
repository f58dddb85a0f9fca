"""Memory that the host still has for this process."""

import math
from contextlib import suppress
from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> float:
    """Bytes that may be allocated without swapping, within the limit of a container; infinity if nobody says.

    Args:
        meminfo: The kernel's account of the machine.
        cgroup: The directory of this process's control group (version 2), as a container sees it.
    """
    found = [math.inf]
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(1024.0 * int(fields["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # no control group, or `max` for one without a limit
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())["inactive_file"]
        found.append(float(limit - used + int(cache)))
    return max(0.0, min(found))
