"""Tokens per second and model FLOP utilisation of full retraining, by rank."""

import time
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.plugins import Precision
from typing_extensions import override

from callbacks.flops import flops_per_token
from recon.scopes import FullRetraining


class Throughput(Callback):
    """Measures the speed of full retraining. In the local scopes, whose steps see parts of the model, it does nothing.

    Every `window` optimizer steps, and when training ends, it logs the speed of the steps since the last time:
    `throughput/tokens_per_second` of all ranks together, `throughput/mfu`, the model FLOPs per second as a fraction of
    the devices' peak, and with several ranks `throughput/rank0/tokens_per_second` and so on. Waiting for batches
    counts; the first step, validation and the time between epochs do not.

    Lightning's ThroughputMonitor takes rank 0 for all ranks and waits for the device after every batch; this one
    asks every rank, and waits once per window.

    Args:
        window: Optimizer steps per measurement.
        peak_flops: FLOP/s of one device in the training precision, for the MFU. Lightning's table of devices if
            null; without an entry there, as for CPUs, there is no MFU. Its H200 and H100 NVL are those of 2:4
            sparse products, twice the dense ones: give the dense figure for these.
    """

    def __init__(self, window: int = 20, peak_flops: float | None = None) -> None:
        if window < 1:
            raise ValueError(f"Throughput.window must be at least 1 optimizer step, got {window}")
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"Throughput.peak_flops must be positive FLOP/s of one device, got {peak_flops}")
        self.window, self.peak_flops = window, peak_flops
        self._flops_per_token: int | None = None  # None: not a fit to measure
        self._peak: float | None = None
        self._num_ranks = 1
        self._reset(step=0)

    def summary(self) -> dict[str, float | None]:
        """Summarise the steps from the second to the last, over all ranks.

        Returns:
            `tokens` in `seconds`, `tokens_per_second`, and `mfu`; None for unknown values.
        """
        rate = self._total_tokens / self._total_seconds if self._total_seconds else None
        return {
            "tokens": float(self._total_tokens),
            "seconds": self._total_seconds,
            "tokens_per_second": rate,
            "mfu": None if rate is None else self._mfu(rate, self._num_ranks),
        }

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._flops_per_token = None
        if not isinstance(pl_module, FullRetraining):
            return
        seq_len = pl_module.data.seq_len
        self._flops_per_token = flops_per_token(pl_module.model, seq_len)  # not in `setup`: nothing is frozen there yet
        if pl_module.loss == "distillation":
            self._flops_per_token += flops_per_token(pl_module.model, seq_len, backward=False)  # the teacher's
        self._num_ranks = trainer.world_size
        self._peak = self.peak_flops or get_available_flops(trainer.strategy.root_device, _dtype(trainer, pl_module))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset(trainer.global_step)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._flops_per_token is not None and self._warm and self._started is None:
            self._start(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._flops_per_token is None:
            return
        self._tokens += batch["input_ids"].numel()
        steps = trainer.global_step - self._step  # grows once per optimizer step, however many batches that takes
        if not self._warm and steps:  # the first step allocates and compiles
            self._warm, self._tokens, self._step = True, 0, trainer.global_step
            self._start(trainer)
        elif self._warm and steps >= self.window:
            self._measure(trainer)
            self._start(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._flops_per_token is not None and self._warm and self._tokens:
            self._measure(trainer)

    def _reset(self, step: int) -> None:
        self._warm = False
        self._tokens, self._seconds, self._step = 0, 0.0, step  # of this rank, since the last measurement
        self._started: float | None = None
        self._total_tokens, self._total_seconds = 0, 0.0  # of all ranks together, and of the slowest

    def _start(self, trainer: L.Trainer) -> None:
        self._started = _now(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if self._started is not None:
            self._seconds += _now(trainer) - self._started
            self._started = None

    def _measure(self, trainer: L.Trainer) -> None:
        """Measure on all ranks: each takes the same number of optimizer steps, so all of them call this together."""
        self._stop(trainer)
        ranks = [(float(self._tokens), self._seconds)]
        if self._num_ranks > 1:
            mine = torch.tensor(ranks[0], dtype=torch.float64, device=trainer.strategy.root_device)
            each = [torch.empty_like(mine) for _ in range(self._num_ranks)]
            dist.all_gather(each, mine)  # trainer.strategy.all_gather warns: torch has deprecated what it calls
            ranks = [tuple(row.tolist()) for row in each]
        tokens, seconds = sum(int(tokens) for tokens, _ in ranks), max(seconds for _, seconds in ranks)
        self._total_tokens += tokens
        self._total_seconds += seconds
        self._tokens, self._seconds, self._step = 0, 0.0, trainer.global_step

        metrics = self._metrics("throughput", tokens / seconds, self._num_ranks)
        for rank, (its_tokens, its_seconds) in enumerate(ranks if self._num_ranks > 1 else ()):
            metrics |= self._metrics(f"throughput/rank{rank}", its_tokens / its_seconds, 1)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step - 1)  # where Lightning puts this step's loss

    def _metrics(self, prefix: str, tokens_per_second: float, num_devices: int) -> dict[str, float]:
        mfu = self._mfu(tokens_per_second, num_devices)
        return {f"{prefix}/tokens_per_second": tokens_per_second} | ({} if mfu is None else {f"{prefix}/mfu": mfu})

    def _mfu(self, tokens_per_second: float, num_devices: int) -> float | None:
        if self._flops_per_token is None or self._peak is None:
            return None
        return tokens_per_second * self._flops_per_token / (self._peak * num_devices)


def _dtype(trainer: L.Trainer, module: FullRetraining) -> torch.dtype:
    """Return the precision of matrix products."""
    plugin = trainer.precision_plugin
    # Lightning takes the plain plugin for float32, but it leaves the model as it is, which may be bfloat16.
    return module.model.dtype if type(plugin) is Precision else _plugin_to_compute_dtype(plugin)


def _now(trainer: L.Trainer) -> float:
    """Return the time after all work of the device is done."""
    if trainer.strategy.root_device.type != "cpu":
        torch.accelerator.synchronize(trainer.strategy.root_device)
    return time.perf_counter()
