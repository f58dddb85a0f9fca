"""Memory that is still available, by what the kernel and a container's control group say."""

import math
from pathlib import Path

from recon.profiling.host_memory import available_bytes


def test_the_tighter_of_machine_and_container_counts(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo, cgroup) == math.inf
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    assert available_bytes(meminfo, cgroup) == 4000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("3000\n")
    (cgroup / "memory.stat").write_text("anon 10\ninactive_file 500\n")
    assert available_bytes(meminfo, cgroup) == 4000 * 1024
    (cgroup / "memory.max").write_text("10000\n")
    assert available_bytes(meminfo, cgroup) == 10000 - 3000 + 500


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() <= math.inf
