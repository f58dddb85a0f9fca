"""Peak memory, phase by phase, and what of it training itself holds."""

import gc
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich import box
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from recon.atomic import write_json
from recon.footprint import Footprint, footprint, has_state
from recon.memory import PeakMeter, resident_bytes
from recon.phases import PhaseListener
from recon.ranks import rank
from recon.report.memory import SPLIT, everything_else
from recon.run import memory_file

MIB = 2**20


class MemoryProfiler(Callback, PhaseListener):
    """Measures the peak of every phase of a run and writes `memory.json` as phases end, one file per rank.

    On the host that is the resident memory of the process, on a CUDA device what its allocator had
    allocated and reserved. `baseline_host_bytes` is the process with its libraries loaded, before the model.

    A phase that takes optimizer steps has a `split` too: what weights, gradients and optimizer state held between
    backward pass and step, at the first step that found optimizer state. It looks at each tensor once a phase.

    Args:
        print_table: Print the phases when the run ends.
    """

    def __init__(self, print_table: bool = True) -> None:
        self.print_table = print_table
        self.phases: list[dict[str, Any]] = []
        self._meter = PeakMeter()
        self._directory: Path | None = None
        self._baseline = 0
        self._started = 0.0
        self._first_step: int | None = None  # of this phase
        self._measured_step: int | None = None
        self._footprint: Footprint | None = None

    @override
    def on_run_start(self, directory: Path) -> None:
        self._directory, self.phases = directory, []
        self._baseline = resident_bytes()
        # The libraries' objects stay: looking through them would add 0.3 s to every phase, and so to every window.
        gc.freeze()

    @override
    def on_phase_start(self, name: str) -> None:
        self._first_step = self._measured_step = self._footprint = None
        self._meter.start()
        self._started = time.monotonic()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        step = trainer.global_step
        if self._first_step is None:
            self._first_step = step
        if self._measured_step not in (None, step):
            return
        is_complete = has_state(trainer.optimizers)
        if step == self._first_step and not is_complete:
            return
        # DeepSpeed comes here after each micro-batch; ZeRO-1 keeps whole gradients up to the last but one of a step.
        seen = footprint(pl_module, trainer.optimizers)
        if self._footprint is None or seen.total > self._footprint.total:
            self._footprint = seen
        if is_complete:  # not if loss scaling skipped the steps so far
            self._measured_step = step

    @override
    def on_phase_end(self, name: str) -> None:
        peaks = self._meter.stop()
        seconds = round(time.monotonic() - self._started, 3)
        split = self._footprint and {f"{part}_bytes": size for part, size in asdict(self._footprint).items()}
        self.phases.append({"phase": name, "seconds": seconds, **asdict(peaks), "split": split})
        self._write()

    @override
    def on_run_end(self, failed: bool) -> None:
        gc.unfreeze()
        if self.print_table and not failed and rank() == 0:
            console = Console(highlight=False)
            console.print(f"Peak memory by phase in MiB (host: {self._meter.method})", style="italic")
            console.print(self._table())

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
        is_split = any(phase["split"] for phase in self.phases)
        headers = ["seconds", "host", "above\nlibraries", *["device", "reserved"] * on_device]
        headers += ["weights", "gradients", "optimizer", "other"] * is_split
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        table.add_column("phase", overflow="fold")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
        for phase in _largest_window_only(self.phases):
            table.add_row(str(phase["phase"]), *self._cells(phase, on_device, is_split))
        return table

    def _cells(self, phase: dict[str, Any], on_device: bool, is_split: bool) -> list[str]:
        above, split = phase["host_bytes"] - self._baseline, phase["split"]
        sizes = [phase["host_bytes"], above]
        if on_device:
            sizes += [phase["device_allocated_bytes"] or 0, phase["device_reserved_bytes"] or 0]
        if split:
            sizes += [*(split[name] for name in SPLIT), everything_else(split, above, phase["device_allocated_bytes"])]
        cells = [f"{phase['seconds']:.1f}", *(f"{size / MIB:.0f}" for size in sizes)]
        return cells + [""] * (4 * (is_split and not split))


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
