"""Predicted memory, disk, FLOPs and time of a run, from the model's configuration alone."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import lightning as L
import torch

from recon.data import TokenData
from recon.models.loading import ModelSource
from recon.models.matrices import parameters_of
from recon.planner.evaluation import evaluation_snapshots
from recon.planner.fake.model import FakeModel
from recon.planner.flops import PREPARATION, Kind, full_flops, local_flops, seconds_of, uniform
from recon.planner.full import full_snapshots, held_on_host, optimizer_bytes
from recon.planner.local import FakeModels, calibration_bytes, local_snapshots, start_bytes, windows_to_recover
from recon.planner.options import PlanOptions, require_plannable
from recon.planner.rates import Precision, Rates, precisions, speeds_at
from recon.planner.snapshot import FP32, Snapshot, numel
from recon.planner.trainer_options import trainer_options
from recon.profiling.entries import CATEGORIES
from recon.pruning.patterns import Pattern
from recon.scopes import Scope

Speed = float | Mapping[Kind, float]
"""FLOP/s of one process: one number for all kinds, or one for each."""

_log = logging.getLogger(__name__)


class Shape:
    """A model of which only the configuration is known, with its fake models in several precisions.

    Args:
        source: The model; only its configuration is read, from the hub if it is there.

    Attributes:
        name: Name of the model; the type of a random one.
        num_parameters: Number of parameters, tied ones once.
        stored: Precision in which the model is loaded.
    """

    def __init__(self, source: ModelSource) -> None:
        skeleton = source.skeleton()
        self.name = f"a random {skeleton.config.model_type}" if source.shape is not None else source.name
        self.num_parameters = numel(skeleton.parameters())
        self.stored: torch.dtype = skeleton.dtype
        self._config, self._trust = skeleton.config, source.trust_remote_code
        self._fakes: dict[torch.dtype, FakeModel] = {}

    def fake(self, options: PlanOptions) -> FakeModel:
        """The fake model in the precision of the weights on the device."""
        return self._in(options.weights_dtype(self.stored))

    def loaded(self, options: PlanOptions) -> FakeModel:
        """The fake model in the precision in which it is loaded and evaluated."""
        return self._in(options.dtype or self.stored)

    def fakes(self, options: PlanOptions) -> FakeModels:
        """The fake models of a local scope: in the stored precision, and in fp32 for the training of windows."""
        stored = self.fake(options)
        return FakeModels(stored, self._in(torch.promote_types(stored.dtype, torch.float32)))

    def _in(self, dtype: torch.dtype) -> FakeModel:
        if dtype not in self._fakes:
            self._fakes[dtype] = FakeModel(self._config, dtype, self._trust)
        return self._fakes[dtype]


@dataclass(frozen=True)
class Prediction:
    """The needs of each process of a run in recovery and evaluation; libraries and pruning are left out.

    Args:
        options: Options of the run.
        snapshots: The largest snapshot of every kind.
        host: Category -> bytes in the memory of one machine beside those on devices, of all its processes together.
            Where the host is the device too, the two add up.
        disk: Content -> bytes in the run directory at its fullest.
        flops_by_kind: FLOPs of all processes together.
        seconds: Time at the given speeds; None without them.
        speeds: FLOP/s of one process by kind; empty without them.
        precisions: Precision of the products of each kind.
    """

    options: PlanOptions
    snapshots: list[Snapshot]
    host: Mapping[str, int]
    disk: Mapping[str, int]
    flops_by_kind: Mapping[Kind, int]
    seconds: float | None = None
    speeds: Mapping[Kind, float] = field(default_factory=dict)
    precisions: Mapping[Kind, Precision] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """FLOPs of all processes together."""
        return sum(self.flops_by_kind.values())

    def seconds_of(self, kind: Kind) -> float | None:
        """Time that one kind of FLOPs takes; None without a speed."""
        if not self.speeds:
            return None
        return seconds_of({kind: self.flops_by_kind[kind]}, self.speeds, self.options)

    @property
    def preparation(self) -> float | None:
        """Time before training, relative to that of training; None without speeds or a training."""
        training = self.seconds_of("training") if self.options.is_local else None
        return sum(self.seconds_of(kind) or 0.0 for kind in PREPARATION) / training if training else None

    @property
    def peak(self) -> Snapshot:
        """The largest snapshot."""
        return max(self.snapshots, key=lambda snapshot: snapshot.total)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, all amounts in bytes."""
        peak = self.peak
        return {
            "scope": self.options.scope,
            "setting": self.options.as_dict(),
            "steps": self.options.steps,
            "peak_bytes": peak.total,
            "moment": peak.name,
            "categories": {category: peak.held[category] for category in CATEGORIES},
            "moments": {snapshot.name: snapshot.total for snapshot in self.snapshots},
            "host_bytes": sum(self.host.values()),
            "host": dict(self.host),
            "disk_bytes": sum(self.disk.values()),
            "disk": dict(self.disk),
            "flops": self.flops,
            "work": dict(self.flops_by_kind),
            "precisions": {kind: self.precisions[kind] for kind in self.flops_by_kind},
            "seconds": self.seconds,
        }


def predict(shape: Shape, options: PlanOptions, speed: Speed | None = None, rates: Rates | None = None) -> Prediction:
    """Predict the needs of a run.

    Args:
        shape: The model.
        options: The options of the run; the number of processes is theirs too.
        speed: FLOP/s of one process.
        rates: FLOP/s of a device by precision, where there is no speed; no time is predicted without either.

    Raises:
        ValueError: If the model cannot be read or recovered in this way.
    """
    try:
        return _predict(shape, options, speed, rates)
    except (RuntimeError, AssertionError) as error:  # an operator, or a FLOP formula of torch, that refuses its inputs
        raise ValueError(
            f"planning runs a model's own code on tensors without numbers, {shape.name} cannot be run so: {error}"
        ) from error


def _predict(shape: Shape, options: PlanOptions, speed: Speed | None, rates: Rates | None) -> Prediction:
    snapshots = _largest_snapshots(shape, options)
    flops = flops_of(shape, options)
    stored = shape.fake(options).dtype
    speeds = uniform(speed) if isinstance(speed, float | int) else speed
    if speeds is None and rates is not None:
        speeds = speeds_at(rates, options, stored)
    seconds = None if speeds is None else seconds_of(flops, speeds, options)
    needs = snapshots, _host(shape, options), _disk(shape, options), flops
    return Prediction(options, *needs, seconds, speeds or {}, precisions(options, stored))


def flops_of(shape: Shape, options: PlanOptions) -> Counter[Kind]:
    """Count the FLOPs of a run by kind, all processes together, which is quicker than the whole prediction."""
    if options.is_local:
        return local_flops(shape.fakes(options), options)
    return full_flops(shape.fake(options), options)


def peak_of(shape: Shape, options: PlanOptions) -> Snapshot:
    """Predict the largest snapshot alone, which is quicker than the whole prediction."""
    return max(_largest_snapshots(shape, options), key=lambda snapshot: snapshot.total)


def _largest_snapshots(shape: Shape, options: PlanOptions) -> list[Snapshot]:
    """The largest snapshot of every kind."""
    largest: dict[str, Snapshot] = {}
    if options.is_local:
        snapshots = local_snapshots(shape.fakes(options), options)
    else:
        snapshots = full_snapshots(shape.fake(options), options)
    for snapshot in chain(snapshots, evaluation_snapshots(shape.loaded(options), options)):
        if snapshot.name not in largest or snapshot.total > largest[snapshot.name].total:
            largest[snapshot.name] = snapshot
    return list(largest.values())


def _masks(fake: FakeModel, options: PlanOptions) -> int:
    """Bytes of all bit-packed masks, on the host and on disk."""
    if not options.masked:
        return 0
    pruned = parameters_of(fake.prunable(options.exclude).values())
    return sum(-(-parameter.numel() // 8) for parameter in pruned.values())


def _host(shape: Shape, options: PlanOptions) -> dict[str, int]:
    fake = shape.fake(options)
    item = (options.dtype or shape.stored).itemsize
    whole = shape.num_parameters * item  # loaded by every process, and gathered by one to be written
    held: Counter[str] = Counter(masks=_masks(fake, options))
    held["other"] = (options.num_sequences + options.num_validation) * options.seq_len * torch.int64.itemsize
    if options.is_local:
        blocks = [fake.block_numel(block) for block in fake.anatomy.blocks]
        outside = shape.num_parameters - sum(blocks)
        # Blocks that are read from disk are on the device alone.
        held["weights"] = outside * item if options.offload == "disk" else whole
        if options.evaluates and options.offload == "host":  # of each model that is measured, beside the scope's
            held["weights"] *= 3 if options.drift and options.masked else 2
        held["calibration"] = calibration_bytes(fake, options)["host"]
    else:
        offloaded = held_on_host(fake, options)
        held["weights"] = offloaded["weights"] if options.partitioned else max(whole, offloaded["weights"])
        if options.offload == "host":  # before the fit beside the scope's model, after it beside the dense one
            copies = 2 if options.evaluates and options.masked and (options.baselines or options.drift) else 1
            held["weights"] = max(copies * whole, held["weights"])
        if options.offload != "none":
            held["calibration"] = _walked(fake, options)
        held["gradients"], held["optimizer"] = offloaded["gradients"], offloaded["optimizer"]
    onloaded = options.offload == "none" or (options.offload == "disk" and not options.is_local)
    if options.device == "cpu" and onloaded and not options.offload_parameters:
        held["weights"] = 0  # the host's are the device's
    if options.is_local:
        held["weights"] += start_bytes(fake, options)
    processes = -(-options.world_size // options.num_nodes)
    return {name: processes * held[name] for name in CATEGORIES}


def _walked(fake: FakeModel, options: PlanOptions) -> int:
    """Bytes of the hidden states of a walk through the blocks: its inputs and outputs, or those of two models."""
    numbers = (2 * options.num_sequences, 2 * (options.num_test or 0), 4 * options.num_validation)
    return max(numbers) * options.seq_len * fake.dim * fake.item


def _disk(shape: Shape, options: PlanOptions) -> dict[str, int]:
    item, fake = (options.dtype or shape.stored).itemsize, shape.fake(options)
    disk = {"model": shape.num_parameters * item, "masks": _masks(fake, options)}
    if options.is_local:
        windows = windows_to_recover(fake, options)
        processes = options.world_size
        disk["activations"] = processes * calibration_bytes(fake, options)["disk"]
        disk["windows"] = item * numel(fake.parameters[name] for window in windows for name in window.owned)
    else:
        weights = fake.num_parameters * (FP32 if options.gathers_half else fake.item)
        # The last one is deleted when the next is complete.
        disk["checkpoints"] = 2 * (weights + optimizer_bytes(fake, options))
        if options.solves:
            disk["start"] = item * 8 * _masks(fake, options)
    return disk


def forecast(
    scope: Scope,
    data: TokenData,
    trainer: L.Trainer,
    exclude: tuple[str, ...],
    masked: bool,
    prunes_by_gram: bool = False,
    pattern: Pattern | None = None,
) -> dict[str, Any]:
    """Predict the needs of a run that is about to begin, as plain data. It never stops the run.

    Takes a second or less, loads nothing, connects nothing and leaves the run as it was. The number of processes is
    that of the trainer.

    Args:
        scope: The scope, before or after its model is loaded.
        data: The data.
        trainer: The trainer, before or after its processes are connected.
        exclude: Patterns of modules that stay dense.
        masked: Whether the model is pruned.
        prunes_by_gram: Whether masks are chosen along with recovery, from Gram matrices.
        pattern: Which zeros are allowed, if that is known.

    Returns:
        `Prediction.as_dict`, or the `reason` alone why there is none; a warning in the log then says it too.
    """
    try:
        require_plannable(pattern)
        options = PlanOptions.of(scope, data, trainer_options(trainer), exclude, masked, prunes_by_gram)
        return predict(Shape(scope.source), options).as_dict()
    except Exception as error:  # whatever fails here, the run itself may succeed
        reason = " ".join(str(error).split()) or type(error).__name__
        _log.warning("no prediction of memory and FLOPs: %s", reason)
        return {"reason": reason}
