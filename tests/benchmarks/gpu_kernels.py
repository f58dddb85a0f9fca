"""The kernels that take most of a device's time, over a few windows or steps in the middle of a fit."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from recon.profiling.phases import PhaseListener, is_window

SHOWN = 5
"""Kernels of a table."""


class KernelProfile(Callback, PhaseListener):
    """Profiles windows of a local scope, or steps of full retraining, `first` to `last`, counted from 1.

    Attributes:
        overhead: Seconds of the fit that starting and stopping the profiler took.
    """

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity]) if activity in supported_activities() else None
        self._count, self._is_on, self.overhead, self._seconds = 0, False, 0.0, 0.0

    def on_run_start(self, directory: Path, device: torch.device) -> None:
        """Nothing: the profile begins in the middle."""

    def on_phase_start(self, name: str) -> None:
        """Count a window."""
        if is_window(name):
            self._advance()

    def on_phase_end(self, name: str) -> None:
        """Nothing: the next window ends the profile."""

    def on_run_end(self, failed: bool) -> None:
        """End a profile that an error has cut short."""
        self._stop()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count a step where there are no windows."""
        if not pl_module.by_window:
            self._advance()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End a profile that reaches the end of the fit."""
        self._stop()

    def result(self) -> dict[str, Any]:
        """The largest kernels by name, and the seconds of all of them beside those of the profiled part.

        Copies count as kernels on a CUDA device. On a CPU these are operators.
        """
        if self._profile is None:
            return {"reason": f"this build of torch cannot profile {self.device.type}"}
        if not self._seconds:
            return {}
        microseconds: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in self._profile.events() or ():
            if getattr(event, "is_user_annotation", False):
                continue  # as of an optimizer's step, around kernels that count themselves
            if self.device.type == "cpu":
                microseconds[event.name] += event.self_cpu_time_total
            elif event.device_type == DeviceType.CUDA:
                microseconds[event.name] += event.time_range.elapsed_us()
            calls[event.name] += 1
        total = sum(microseconds.values())
        largest = [
            {"name": name, "share": spent / total, "milliseconds": spent / 1e3, "calls": calls[name]}
            for name, spent in microseconds.most_common(SHOWN)
            if spent
        ]
        return {"seconds": self._seconds, "busy_seconds": total / 1e6, "kernels": largest}

    def _advance(self) -> None:
        self._count += 1
        if self._count == self.first and self._profile is not None:
            began = time.perf_counter()
            self._profile.start()
            self._is_on, self._began = True, time.perf_counter()
            self.overhead += self._began - began
        elif self._count == self.last + 1:
            self._stop()

    def _stop(self) -> None:
        if not self._is_on or self._profile is None:
            return
        self._is_on = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ended = time.perf_counter()
        self._seconds = ended - self._began
        self._profile.stop()
        self.overhead += time.perf_counter() - ended
