"""Peak memory by phase and by category."""

import gc
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich import box
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from callbacks.follower import Follower
from recon.basics.files import write_json
from recon.basics.manifest import Entry
from recon.basics.run_paths import RunPaths
from recon.distributed.ranks import rank
from recon.profiling.entries import CATEGORIES, SIDES, Peak, Side
from recon.profiling.footprint import Footprint, footprint, has_state
from recon.profiling.out_of_memory import (
    FULL_CURES,
    LOCAL_CURES,
    advice,
    full_side,
    largest_owners,
    live_by_category,
)
from recon.profiling.phases import PhaseListener, PhaseName
from recon.profiling.process_memory import PeakMeter, resident_bytes
from recon.report.memory_phases import MIB, SPLIT, Phase, everything_else, fold_windows
from recon.scopes import FullRetraining

NOTHING = Peak(dict.fromkeys(CATEGORIES, 0))


class MemoryProfiler(Callback, PhaseListener):
    """Measures the peak of every phase of a run and writes `memory.json` as phases end, one file per rank.

    On the host the peak is the resident memory of the process, on a CUDA device the memory that its allocator had
    allocated and reserved. `baseline_host_bytes` is the process with its libraries loaded, before the model.

    `categories` are the bytes of live tensors at their peak, on the device and on the host, and `moment` is its time.
    Without a CUDA device, `device` counts tensors that would be on one, `host` tensors that would stay: offloaded
    blocks, activations kept on the host, packed masks, tokens. `recon.profiling.ledger` counts them, at the times that
    `callbacks.follower` chooses. If memory runs out, `out_of_memory` lists the live tensors, and the error names
    options that help.

    A phase with optimizer steps has a `split` too: the bytes of weights, gradients and optimizer state between backward
    pass and step, at the first step with optimizer state. It reads each tensor once a phase.

    Args:
        print_table: Print the phases when the run ends.
        by_category: Follow live tensors; without, there are no `categories`.
    """

    def __init__(self, print_table: bool = True, by_category: bool = True) -> None:
        self.print_table = print_table
        self.phases: list[dict[str, Any]] = []
        self._meter = PeakMeter()
        self._follower = Follower() if by_category else None
        self._directory: Path | None = None
        self._device = torch.device("cpu")
        self._baseline = 0
        self._phase = ""
        self._started = 0.0
        self._first_step: int | None = None  # of this phase
        self._measured_step: int | None = None
        self._footprint: Footprint | None = None
        self._trainer: L.Trainer | None = None  # while it fits
        self._module: L.LightningModule | None = None
        self._is_logged = False
        self._num_logged = 0
        self._shortage: dict[str, Any] | None = None

    @override
    def on_run_start(self, directory: Path, device: torch.device) -> None:
        self._directory, self._device, self.phases, self._num_logged = directory, device, [], 0
        self._trainer = self._module = self._shortage = None
        paths = RunPaths(directory)
        paths.manifest.forget(paths.memory(rank()))
        gc.collect()  # or the cycles of an earlier run in this process would be frozen, and counted
        self._baseline = resident_bytes()
        if self._follower:
            self._follower.begin_run(device)
        # The libraries' objects stay: looking through them would add 0.3 s to every phase, and so to every window.
        gc.freeze()

    @override
    def on_phase_start(self, name: str) -> None:
        self._first_step = self._measured_step = self._footprint = None
        self._phase, self._is_logged = name, False
        self._meter.start()
        self._started = time.monotonic()
        if self._follower:
            self._follower.begin_phase(name)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer, self._module = trainer, pl_module
        if self._follower:
            self._follower.begin_fit(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = None
        if self._follower:
            self._follower.ledger.close()  # phases may be announced by nobody

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._follower:
            self._follower.begin_batch(trainer, batch_idx)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if self._follower:
            self._follower.begin_backward(trainer)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self._follower:
            self._follower.begin_update(trainer)
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
            if self._follower:
                self._follower.count(trainer)
        if is_complete:  # not if loss scaling skipped the steps so far
            self._measured_step = step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        peaks = self._follower and self._follower.end_batch()
        if peaks:
            self._log(trainer, peaks)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._follower:
            self._log(trainer, self._follower.ledger.peaks)  # loggers are closed before the last phase ends

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._note_shortage(exception)
        if self._follower:
            self._follower.ledger.close()

    @override
    def on_phase_end(self, name: str) -> None:
        self._note_shortage(sys.exception())
        found = self._follower.end_phase() if self._follower else {}  # stops the ledger, even if a line below fails
        peaks = self._meter.stop()
        seconds = round(time.monotonic() - self._started, 3)
        split = self._footprint and {f"{part}_bytes": size for part, size in asdict(self._footprint).items()}
        shown = {side: found.get(side, NOTHING) for side in SIDES} if found else {}
        self.phases.append(
            {
                "phase": name,
                "seconds": seconds,
                **asdict(peaks),
                "split": split,
                "categories": {side: dict(peak.categories) for side, peak in shown.items()},
                "moment": {
                    side: {"stage": peak.stage, "seconds": peak.seconds, "operation": peak.operation}
                    for side, peak in shown.items()
                },
            }
        )
        self._write()
        if self._trainer is not None and self._first_step is not None and name != PhaseName.SEARCH:
            self._log(self._trainer, found)

    @override
    def on_run_end(self, failed: bool) -> None:
        gc.unfreeze()
        if self._directory is not None and not failed:  # once, not with each phase: a window would wait for the disk
            paths = RunPaths(self._directory)
            paths.manifest.record({file: Entry.of(file) for file in [paths.memory(rank())] if file.exists()})
        if failed and self._shortage is not None:
            raise MemoryError(self._shortage["advice"])
        if self.print_table and not failed and rank() == 0:
            console = Console(highlight=False)
            console.print(f"Peak memory by phase in MiB (host: {self._meter.method})", style="italic")
            console.print(self._table())

    def _log(self, trainer: L.Trainer, found: Mapping[Side, Peak]) -> None:
        """Log the peaks of a phase that trains, once."""
        if self._is_logged or not found:
            return
        self._is_logged = True
        metrics = {}
        for side, peak in found.items():
            sizes = {**peak.categories, "tracked": peak.total}
            metrics |= {f"memory/{side}/{name}_mib": size / MIB for name, size in sizes.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._num_logged)
        self._num_logged += 1

    def _note_shortage(self, error: BaseException | None) -> None:
        """Note the live tensors if memory ran out; the traceback still holds those of the failed step."""
        if self._follower is None:
            return
        ledger = self._follower.ledger
        ledger.pause()
        full = full_side(error)
        if self._shortage is not None or full is None:
            return
        was_followed = ledger.is_open
        if not was_followed:
            ledger.open("out of memory")
        live = ledger.live()
        categories = live_by_category(live.values())
        if self._device.type == "cpu":
            full = None
        elif full == "device" and not was_followed:  # the tensors of autograd are then known to the allocator alone
            unseen = torch.cuda.memory_allocated(self._device) - sum(categories["device"].values())
            categories["device"]["activations"] += max(0, unseen)
        model = getattr(self._module, "model", None)  # by itself, for an offloaded one is no part of the module
        cures = FULL_CURES if isinstance(self._module, FullRetraining) else LOCAL_CURES
        self._shortage = {
            "phase": self._phase,
            "error": str(error),
            "categories": categories,
            "largest": largest_owners(live, model, [] if self._trainer is None else self._trainer.optimizers),
            "advice": advice(categories, full, self._phase, cures),
        }

    def _write(self) -> None:
        if self._directory is not None:
            content = {
                "method": self._meter.method,
                "device": str(self._device),
                "baseline_host_bytes": self._baseline,
                "phases": self.phases,
                **({"out_of_memory": self._shortage} if self._shortage else {}),
            }
            write_json(RunPaths(self._directory).memory(rank()), content)

    def _table(self) -> Table:
        on_device = any(phase["device_allocated_bytes"] is not None for phase in self.phases)
        is_split = any(phase["split"] for phase in self.phases)
        headers = ["seconds", "host", "above\nlibraries", *["device", "reserved"] * on_device]
        headers += ["weights", "gradients", "optimizer", "other"] * is_split
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        table.add_column("phase", overflow="fold")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
        for phase in fold_windows(self.phases):
            table.add_row(str(phase["phase"]), *self._cells(phase, on_device, is_split))
        return table

    def _cells(self, phase: Phase, on_device: bool, is_split: bool) -> list[str]:
        above, split = phase["host_bytes"] - self._baseline, phase["split"]
        sizes = [phase["host_bytes"], above]
        if on_device:
            sizes += [phase["device_allocated_bytes"] or 0, phase["device_reserved_bytes"] or 0]
        if split:
            sizes += [*(split[name] for name in SPLIT), everything_else(split, above, phase["device_allocated_bytes"])]
        cells = [f"{phase['seconds']:.1f}", *(f"{size / MIB:.0f}" for size in sizes)]
        return cells + [""] * (4 * (is_split and not split))
