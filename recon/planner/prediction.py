"""Predicted memory, disk, operations and time of a run, from the model's shape alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from recon.data import TokenData
from recon.models.loading import ModelSource
from recon.planner.fake.model import Rehearsal
from recon.planner.flops import Kind, full_work, local_work, seconds_of, stated
from recon.planner.full import full_moments, held_on_host, optimizer_bytes
from recon.planner.local import Cast, calibration_bytes, local_moments, windows_to_recover
from recon.planner.options import Setting
from recon.planner.snapshot import CATEGORIES, Moment, numel
from recon.scopes import Scope


class Shape:
    """A model of which nothing but the configuration is known, with what was rehearsed on it.

    Args:
        source: Which model; only its configuration is read, from the hub if it is there.

    Attributes:
        name: The model's name; the type of a random one.
        num_parameters: Tied ones once.
        stored: In which precision it is loaded.
    """

    def __init__(self, source: ModelSource) -> None:
        skeleton = source.skeleton()
        self.name = f"a random {skeleton.config.model_type}" if source.shape is not None else source.name
        self.num_parameters = numel(skeleton.parameters())
        self.stored: torch.dtype = skeleton.dtype
        self._config, self._trust = skeleton.config, source.trust_remote_code
        self._rehearsals: dict[torch.dtype, Rehearsal] = {}

    def rehearsal(self, setting: Setting) -> Rehearsal:
        """The model in the precision that its weights have on the device."""
        return self._in(setting.weights_dtype(self.stored))

    def cast(self, setting: Setting) -> Cast:
        """The model as it is passed, and as its windows are trained: in fp32, whatever it is stored in."""
        stored = self.rehearsal(setting)
        return Cast(stored, self._in(torch.promote_types(stored.dtype, torch.float32)))

    def _in(self, dtype: torch.dtype) -> Rehearsal:
        if dtype not in self._rehearsals:
            self._rehearsals[dtype] = Rehearsal(self._config, dtype, self._trust)
        return self._rehearsals[dtype]


@dataclass(frozen=True)
class Prediction:
    """What each process of a run needs for recovery; libraries, pruning before it and evaluation are left out.

    Args:
        setting: Of the run.
        moments: The worst of every kind, what the device that computes holds then.
        host: Category -> bytes in the memory of one machine beside what devices hold, of all processes on it. Where
            the host is the device too, the two add up.
        disk: What -> bytes in the run directory at its fullest.
        work: FLOPs of all processes together, by kind.
        seconds: At the FLOP rate given; None without one.
    """

    setting: Setting
    moments: list[Moment]
    host: Mapping[str, int]
    disk: Mapping[str, int]
    work: Mapping[Kind, int]
    seconds: float | None = None

    @property
    def flops(self) -> int:
        """Of all processes together."""
        return sum(self.work.values())

    @property
    def peak(self) -> Moment:
        """The moment when the device holds most."""
        return max(self.moments, key=lambda moment: moment.total)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, all amounts in bytes."""
        peak = self.peak
        return {
            "scope": self.setting.scope,
            "setting": self.setting.as_dict(),
            "peak_bytes": peak.total,
            "moment": peak.name,
            "categories": {name: peak.held[name] for name in CATEGORIES},
            "moments": {moment.name: moment.total for moment in self.moments},
            "host_bytes": sum(self.host.values()),
            "host": dict(self.host),
            "disk_bytes": sum(self.disk.values()),
            "disk": dict(self.disk),
            "flops": self.flops,
            "work": dict(self.work),
            "seconds": self.seconds,
        }


def predict(shape: Shape, setting: Setting, flop_rate: float | Mapping[Kind, float] | None = None) -> Prediction:
    """Predict what a run needs.

    Args:
        shape: The model.
        setting: The options.
        flop_rate: FLOP/s of one process, one for all kinds of work or one for each.

    Raises:
        ValueError: If the model cannot be read or recovered in this way.
    """
    try:
        return _predict(shape, setting, flop_rate)
    except RuntimeError as error:
        raise ValueError(
            f"planning runs a model's own code on tensors without numbers, {shape.name} cannot be run so: {error}"
        ) from error


def _predict(shape: Shape, setting: Setting, flop_rate: float | Mapping[Kind, float] | None) -> Prediction:
    worst = _moments(shape, setting)
    local = setting.is_local
    work = local_work(shape.cast(setting), setting) if local else full_work(shape.rehearsal(setting), setting)
    rates = stated(flop_rate) if isinstance(flop_rate, float | int) else flop_rate
    seconds = None if rates is None else seconds_of(work, rates, setting)
    return Prediction(setting, worst, _host(shape, setting), _disk(shape, setting), work, seconds)


def peak_of(shape: Shape, setting: Setting) -> Moment:
    """The peak alone: quicker than the whole prediction."""
    return max(_moments(shape, setting), key=lambda moment: moment.total)


def _moments(shape: Shape, setting: Setting) -> list[Moment]:
    """The worst moment of every kind."""
    worst: dict[str, Moment] = {}
    if setting.is_local:
        moments = local_moments(shape.cast(setting), setting)
    else:
        moments = full_moments(shape.rehearsal(setting), setting)
    for moment in moments:
        if moment.name not in worst or moment.total > worst[moment.name].total:
            worst[moment.name] = moment
    return list(worst.values())


def _masks(rehearsal: Rehearsal, setting: Setting) -> int:
    """Bytes of all masks, bit-packed, as they are held on the host and written."""
    if not setting.masked:
        return 0
    prunable = rehearsal.prunable(setting.exclude)
    return sum(-(-module.get_parameter("weight").numel() // 8) for module in prunable.values())


def _host(shape: Shape, setting: Setting) -> dict[str, int]:
    rehearsal = shape.rehearsal(setting)
    item = (setting.dtype or shape.stored).itemsize
    whole = shape.num_parameters * item  # every process loads it, and one gathers it to write it
    held: Counter[str] = Counter(masks=_masks(rehearsal, setting))
    held["other"] = (setting.num_sequences + setting.num_validation) * setting.seq_len * torch.int64.itemsize
    if setting.is_local:
        blocks = [rehearsal.block_numel(block) for block in rehearsal.anatomy.blocks]
        outside = shape.num_parameters - sum(blocks)
        # Blocks that are read from disk are on the device alone.
        held["weights"] = outside * item if setting.offload == "disk" else whole
        held["calibration"] = calibration_bytes(rehearsal, setting)["host"]
    else:
        offloaded = held_on_host(rehearsal, setting)
        held["weights"] = max(whole, offloaded["weights"])
        held["gradients"], held["optimizer"] = offloaded["gradients"], offloaded["optimizer"]
    if setting.device == "cpu" and setting.offload == "none" and not setting.offload_parameters:
        held["weights"] = 0  # the host's are the device's
    processes = -(-setting.world_size // setting.num_nodes)
    return {name: processes * held[name] for name in CATEGORIES}


def _disk(shape: Shape, setting: Setting) -> dict[str, int]:
    item, rehearsal = (setting.dtype or shape.stored).itemsize, shape.rehearsal(setting)
    disk = {"model": shape.num_parameters * item, "masks": _masks(rehearsal, setting)}
    if setting.is_local:
        windows = windows_to_recover(rehearsal, setting)
        processes = setting.world_size
        disk["activations"] = processes * calibration_bytes(rehearsal, setting)["disk"]
        disk["windows"] = item * numel(rehearsal.parameters[name] for window in windows for name in window.owned)
    else:
        weights = rehearsal.num_parameters * rehearsal.item
        # The last one is deleted when the next is complete.
        disk["checkpoints"] = 2 * (weights + optimizer_bytes(rehearsal, setting))
        if setting.solves:
            disk["start"] = item * 8 * _masks(rehearsal, setting)
    return disk


def forecast(
    scope: Scope, data: TokenData, trainer: L.Trainer, exclude: tuple[str, ...], masked: bool
) -> dict[str, Any]:
    """What the run is predicted to need, as plain data; `reason` alone if that cannot be said.

    Takes a second or less, loads nothing, and leaves the run as it was.

    Args:
        scope: Of the run, before or after it is loaded.
        data: Of the run.
        trainer: Of the run.
        exclude: Patterns of modules that stay dense.
        masked: Whether the model is pruned.
    """
    try:
        setting = Setting.of(scope, data, trainer, exclude=exclude, masked=masked)
        return predict(Shape(scope.source), setting).as_dict()
    except ValueError as error:
        return {"reason": str(error)}
