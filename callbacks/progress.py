"""Progress as plain lines, readable in a terminal, a file and beside other processes' lines."""

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from recon.scopes.base import Scope

log = logging.getLogger("recon")


class Progress(Callback):
    """Logs what a fit is at, its loss, its held-out error and the time left.

    Args:
        every_seconds: The least time between two lines within an epoch.
    """

    def __init__(self, every_seconds: float = 5.0) -> None:
        self.every_seconds = every_seconds
        self._started = self._printed = 0.0
        self._first_step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = self._printed = time.monotonic()
        self._first_step = _batches_done(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._printed >= self.every_seconds and not trainer.is_last_batch:
            self._print(trainer, pl_module, epoch_ended=False)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if last or time.monotonic() - self._printed >= self.every_seconds / 5:
            self._print(trainer, pl_module, epoch_ended=True)

    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch_ended: bool) -> None:
        if not trainer.is_global_zero:
            return
        self._printed = time.monotonic()
        done, total = _batches_done(trainer), _batches(trainer)
        elapsed = self._printed - self._started
        rate = (done - self._first_step) / elapsed if elapsed > 0 else 0.0
        left = f"{_clock((total - done) / rate)} left" if rate > 0 else ""
        latest = pl_module.losses.latest if isinstance(pl_module, Scope) else {}
        metrics = {name: float(value) for name, value in (trainer.callback_metrics | latest).items()}
        if not epoch_ended:  # until then Lightning holds the last epoch's, which may be another window's
            metrics = {name: value for name, value in metrics.items() if not name.startswith("held_out")}
        numbers = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in sorted(metrics.items(), reverse=True)]
        where = pl_module.progress if isinstance(pl_module, Scope) else f"epoch {trainer.current_epoch + 1}"
        log.info("  ".join([where, f"{done / max(1, total):4.0%}", *numbers, f"{_clock(elapsed)} spent", left]))


def _batches(trainer: L.Trainer) -> int:
    """Of the whole fit; a limit of steps is exact unless an epoch ends within one."""
    whole = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
    return whole if trainer.max_steps == -1 else min(whole, trainer.max_steps * trainer.accumulate_grad_batches)


def _batches_done(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
