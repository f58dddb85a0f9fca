"""Whole recoveries on the simulated device and on the CPU."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch import Tensor

from recon.data import TokenData
from recon.experiment.directory import RunDirectory
from recon.experiment.options import RunOptions
from recon.experiment.recovery import recover
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import Unstructured
from recon.report import Report
from recon.scopes import Scope
from tests.support.scope_fixtures import QUIET, data_of, trainer_of
from tests.support.simulated.counts import Counts
from tests.support.simulated.device import simulated_cuda
from tests.support.simulated.tags import CUDA

WANDA = RunOptions(Wanda(), Unstructured(0.5))


class _Accelerator(CPUAccelerator):
    """Lets a strategy have a device that is none of the CPU's."""

    def setup_device(self, device: torch.device) -> None:
        """Accept any."""


def trainer_on(device: torch.device, *callbacks: Callback, **options: Any) -> L.Trainer:
    """A quiet trainer on the CPU or on the simulated device."""
    if device.type == "cpu":
        return trainer_of(*callbacks, **options)
    quiet = {name: value for name, value in QUIET.items() if name not in ("accelerator", "devices")}
    strategy = SingleDeviceStrategy(device=device)
    return L.Trainer(**{**quiet, "callbacks": [*callbacks], **options}, accelerator=_Accelerator(), strategy=strategy)


def run(
    scope: Scope,
    directory: Path,
    device: torch.device,
    options: RunOptions = WANDA,
    *callbacks: Callback,
    data: TokenData | None = None,
    **trainer: Any,
) -> Report:
    """Recover into `directory`."""
    L.seed_everything(0, verbose=False)
    report = recover(
        scope, data or data_of(), trainer_on(device, *callbacks, **trainer), RunDirectory(directory, {}), options
    )
    assert report is not None
    return report


def run_on_device(
    scope: Scope, directory: Path, options: RunOptions = WANDA, *callbacks: Callback, **more: Any
) -> tuple[Report, Counts]:
    """Recover into `directory` on the simulated device."""
    with simulated_cuda() as counts:
        return run(scope, directory, CUDA, options, *callbacks, **more), counts


def weights_in(directory: Path) -> dict[str, Tensor]:
    """The weights of the recovered model in a run's directory."""
    return load_file(directory / "model" / "model.safetensors")
