"""Peak memory, phase by phase."""

import gc
import time
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from recon.atomic import write_json
from recon.memory import PeakMeter, resident_bytes
from recon.phases import PhaseListener
from recon.ranks import rank
from recon.run import memory_file

MIB = 2**20


class MemoryProfiler(Callback, PhaseListener):
    """Measures the peak of every phase of a run and writes `memory.json` as phases end, one file per rank.

    On the host that is the resident memory of the process, on a CUDA device what its allocator had
    allocated and reserved. `baseline_host_bytes` is the process with its libraries loaded, before the model.

    Args:
        print_table: Print the phases when the run ends.
    """

    def __init__(self, print_table: bool = True) -> None:
        self.print_table = print_table
        self.phases: list[dict[str, str | float | int | None]] = []
        self._meter = PeakMeter()
        self._directory: Path | None = None
        self._baseline = 0
        self._started = 0.0

    @override
    def on_run_start(self, directory: Path) -> None:
        self._directory, self.phases = directory, []
        self._baseline = resident_bytes()
        # The libraries' objects stay: looking through them would add 0.3 s to every phase, and so to every window.
        gc.freeze()

    @override
    def on_phase_start(self, name: str) -> None:
        self._meter.start()
        self._started = time.monotonic()

    @override
    def on_phase_end(self, name: str) -> None:
        peaks = self._meter.stop()
        seconds = round(time.monotonic() - self._started, 3)
        self.phases.append({"phase": name, "seconds": seconds, **asdict(peaks)})
        self._write()

    @override
    def on_run_end(self, failed: bool) -> None:
        gc.unfreeze()
        if self.print_table and not failed and rank() == 0:
            Console(highlight=False).print(self._table())

    def _write(self) -> None:
        if self._directory is not None:
            content = {
                "method": self._meter.method,
                "baseline_host_bytes": self._baseline,
                "phases": self.phases,
            }
            write_json(self._directory / memory_file(rank()), content)

    def _table(self) -> Table:
        on_device = any(phase["device_allocated_bytes"] is not None for phase in self.phases)
        table = Table(title=f"Peak memory by phase (host: {self._meter.method})", title_justify="left")
        table.add_column("phase")
        headers = ["seconds", "host MiB", "above libraries MiB"]
        for header in headers + ["device MiB", "reserved MiB"] * on_device:
            table.add_column(header, justify="right")
        for phase in _largest_window_only(self.phases):
            host = int(phase["host_bytes"] or 0)
            cells = [f"{phase['seconds']:.1f}", f"{host / MIB:.0f}", f"{(host - self._baseline) / MIB:.0f}"]
            if on_device:
                cells += [
                    f"{int(phase[key] or 0) / MIB:.0f}" for key in ("device_allocated_bytes", "device_reserved_bytes")
                ]
            table.add_row(str(phase["phase"]), *cells)
        return table


def _largest_window_only(phases: list[dict]) -> list[dict]:
    """The phases with all windows folded into one row: the largest, with the seconds of all."""
    windows = [phase for phase in phases if str(phase["phase"]).startswith("window ")]
    if len(windows) < 2:
        return phases
    largest = max(windows, key=lambda phase: (phase["device_allocated_bytes"] or 0, phase["host_bytes"]))
    folded = {
        **largest,
        "phase": f"{len(windows)} windows, largest {str(largest['phase']).removeprefix('window ')}",
        "seconds": sum(window["seconds"] for window in windows),
    }
    first = phases.index(windows[0])
    rest = [phase for phase in phases[first:] if phase not in windows]
    return [*phases[:first], folded, *rest]
