"""The prediction: bytes by category at the worst moment of a run, beside it host memory, disk and FLOPs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from recon.planner.full import full_flops, full_moments, held_on_host, optimizer_bytes
from recon.planner.local import calibration_bytes, local_flops, local_moments, windows_to_recover
from recon.planner.moment import CATEGORIES, Moment, numel
from recon.planner.rehearsal import Rehearsal
from recon.planner.setting import Setting
from recon.pretrained import ModelSource


class Shape:
    """A model of which nothing but the configuration is known, with what was rehearsed on it.

    Args:
        source: Which model; only its configuration is read, from the hub if it is there.

    Attributes:
        name: The model's name.
        num_parameters: Tied ones once.
        stored: In which precision it is loaded.
    """

    def __init__(self, source: ModelSource) -> None:
        skeleton = source.skeleton()
        self.name = source.name
        self.num_parameters = numel(skeleton.parameters())
        self.stored: torch.dtype = skeleton.dtype
        self._config, self._trust = skeleton.config, source.trust_remote_code
        self._rehearsals: dict[torch.dtype, Rehearsal] = {}

    def rehearsal(self, setting: Setting) -> Rehearsal:
        """The model in the precision that its weights have while they are trained."""
        dtype = setting.weights_dtype(self.stored)
        if setting.offload != "none" and not setting.precision.endswith("-true"):
            dtype = torch.float32  # a window on the device is trained in fp32 whatever the model is stored in
        if dtype not in self._rehearsals:
            self._rehearsals[dtype] = Rehearsal(self._config, dtype, self._trust)
        return self._rehearsals[dtype]


@dataclass(frozen=True)
class Prediction:
    """What each process of a run needs for recovery; libraries, pruning before it and evaluation are left out.

    Args:
        setting: Of the run.
        moments: The worst of every kind, what the device that computes holds then.
        host: Category -> bytes in the host's memory beside what its devices hold. Without a device the two add up.
        disk: What -> bytes in the run directory at its fullest.
        flops: Of all processes together.
        seconds: At the FLOP rate given; None without one.
    """

    setting: Setting
    moments: list[Moment]
    host: Mapping[str, int]
    disk: Mapping[str, int]
    flops: int
    seconds: float | None = field(default=None)

    @property
    def peak(self) -> Moment:
        """The moment when the device holds most."""
        return max(self.moments, key=lambda moment: moment.total)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, all amounts in bytes."""
        peak = self.peak
        return {
            "scope": self.setting.scope,
            "setting": {name: getattr(self.setting, name) for name in self.setting.__dataclass_fields__},
            "peak_bytes": peak.total,
            "moment": peak.name,
            "categories": {name: peak.held[name] for name in CATEGORIES},
            "moments": {moment.name: moment.total for moment in self.moments},
            "host_bytes": sum(self.host.values()),
            "host": dict(self.host),
            "disk_bytes": sum(self.disk.values()),
            "disk": dict(self.disk),
            "flops": self.flops,
            "seconds": self.seconds,
        }


def predict(shape: Shape, setting: Setting, flop_rate: float | None = None) -> Prediction:
    """Predict what a run needs.

    Args:
        shape: The model.
        setting: The options.
        flop_rate: FLOP/s of one process in the precision of training, measured or stated.

    Raises:
        ValueError: If the model cannot be read or recovered in this way.
    """
    rehearsal = shape.rehearsal(setting)
    flops = (local_flops if setting.is_local else full_flops)(rehearsal, setting)
    worst = _moments(rehearsal, setting)
    seconds = None if flop_rate is None else flops / flop_rate / setting.world_size
    host, disk = _host(shape, rehearsal, setting), _disk(shape, rehearsal, setting)
    return Prediction(setting, worst, host, disk, flops, seconds)


def peak_of(shape: Shape, setting: Setting) -> Moment:
    """The peak alone: quicker than the whole prediction."""
    return max(_moments(shape.rehearsal(setting), setting), key=lambda moment: moment.total)


def _moments(rehearsal: Rehearsal, setting: Setting) -> list[Moment]:
    """The worst moment of every kind."""
    worst: dict[str, Moment] = {}
    for moment in (local_moments if setting.is_local else full_moments)(rehearsal, setting):
        if moment.name not in worst or moment.total > worst[moment.name].total:
            worst[moment.name] = moment
    return list(worst.values())


def _masks(rehearsal: Rehearsal, setting: Setting) -> int:
    """Bytes of all masks, bit-packed, as they are held on the host and written."""
    if not setting.masked:
        return 0
    prunable = rehearsal.prunable(setting.exclude)
    return sum(-(-module.get_parameter("weight").numel() // 8) for module in prunable.values())


def _host(shape: Shape, rehearsal: Rehearsal, setting: Setting) -> dict[str, int]:
    whole = shape.num_parameters * shape.stored.itemsize  # every process loads it, and one gathers it to write it
    calibration = calibration_bytes(rehearsal, setting) if setting.is_local and setting.offload == "host" else 0
    tokens = (setting.num_sequences + setting.num_validation) * setting.seq_len * torch.int64.itemsize
    window = max((numel(_owned(rehearsal, window)) for window in _windows(rehearsal, setting)), default=0)
    held: Counter[str] = Counter()
    held["weights"] = window * shape.stored.itemsize if setting.offload == "disk" else whole
    held["calibration"], held["masks"], held["other"] = calibration, _masks(rehearsal, setting), tokens
    if not setting.is_local:
        offloaded = held_on_host(rehearsal, setting)
        held["weights"] = max(whole, offloaded["weights"])
        held["gradients"], held["optimizer"] = offloaded["gradients"], offloaded["optimizer"]
    return {name: held[name] for name in CATEGORIES}


def _disk(shape: Shape, rehearsal: Rehearsal, setting: Setting) -> dict[str, int]:
    item = shape.stored.itemsize
    disk = {"model": shape.num_parameters * item, "masks": _masks(rehearsal, setting)}
    if setting.is_local:
        disk["windows"] = item * sum(numel(_owned(rehearsal, window)) for window in _windows(rehearsal, setting))
        if setting.offload == "disk":
            disk["calibration"] = calibration_bytes(rehearsal, setting)
    else:
        weights = rehearsal.num_parameters * rehearsal.dtype.itemsize
        # The last one is deleted when the next is complete.
        disk["checkpoints"] = 2 * (weights + optimizer_bytes(rehearsal, setting))
        if setting.solves:
            disk["start"] = item * 8 * _masks(rehearsal, setting)
    return disk


def _windows(rehearsal: Rehearsal, setting: Setting) -> list[Any]:
    return windows_to_recover(rehearsal, setting) if setting.is_local else []


def _owned(rehearsal: Rehearsal, window: Any) -> list[nn.Parameter]:
    return [rehearsal.parameters[name] for name in window.owned]
