"""One row of the acceptance table, measured in the process that this is called in.

A recovery goes through the steps of `recon fit`, up to the end of its fit: nothing is saved or evaluated. It needs
neither the command line nor a data set: its tokens are random, and random weights are made on the device itself.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from callbacks import MemoryProfiler
from recon.basics.files import write_json
from recon.basics.seeds import derived_seed
from recon.data import TokenData
from recon.data.sources import SPLITS, Split
from recon.distributed import ranks
from recon.distributed.part import Share
from recon.distributed.strategies import FullyShardedStrategy, ZeroStrategy
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import environment
from recon.experiment.job import Job
from recon.experiment.options import RunOptions
from recon.experiment.peaks import NOT_FORESEEN, peaks_of
from recon.experiment.selection import select
from recon.experiment.training import train
from recon.models.loading import ModelSource
from recon.planner.prediction import forecast
from recon.profiling.phases import PhaseName, Phases, is_window
from recon.pruning.criteria import Wanda
from recon.pruning.patterns import Unstructured
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation

from .gpu_kernels import KernelProfile
from .gpu_rows import Row
from .rates import product_rate

SCOPES: dict[str, type[Scope]] = {
    "matrix": MatrixReconstruction,
    "submodule": SubmoduleDistillation,
    "block": BlockDistillation,
    "full": FullRetraining,
}

STRATEGIES: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "zero2": partial(ZeroStrategy, 2),
    "zero3": partial(ZeroStrategy, 3),
    "fsdp2": FullyShardedStrategy,
}

PLAN = "plan.json"
"""File in a row's directory with its prediction, which outlives a row that is stopped."""

SIDE = {"cuda": 8192, "cpu": 256}
"""Side of the square matrices whose products are timed."""


class RandomTokens(TokenData):
    """Random token ids, other ones in every split."""

    def __init__(self, vocabulary: int, num_validation: int, **options: Any) -> None:
        super().__init__(num_validation=num_validation, num_test=1, **options)
        self.vocabulary = vocabulary

    def identity(self) -> dict[str, Any]:
        """Say that it is not text."""
        return {"source": "RandomTokens", "vocabulary": self.vocabulary}

    def tokens(self, split: Split) -> Tensor:
        """The sequences of `split`, int64[num_sequences, seq_len]."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, SPLITS.index(split), 0))
        size = self.num[split], self.seq_len  # DeepSpeed asks for them while it makes tensors on the device
        return torch.randint(self.vocabulary, size, generator=generator, device="cpu")  # pyright: ignore[reportArgumentType]


class MadeOnDevice(ModelSource):
    """A random model whose weights are made on the device: a host takes a minute for seven billion."""

    def __init__(self, shape: dict[str, Any], dtype: str, place: torch.device) -> None:
        super().__init__("random", shape, dtype)
        vars(self).update(place=place)  # the base class is frozen
        self.place: torch.device

    def model(self, device: torch.device | None = None) -> PreTrainedModel:
        """Make the model."""
        with self.place:
            return super().model(device)


def measure(row: Row, device: str, directory: Path) -> dict[str, Any]:
    """Measure one row.

    Args:
        row: The row.
        device: `cpu` or `cuda`.
        directory: An empty directory for its run.
    """
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    kinds = {"rates": _rates, "command": _command, "fit": _fit}
    return kinds[row.kind](row, place, directory)


def facts(directory: Path) -> dict[str, Any]:
    """Say what a row has left in its directory, whether it ended or was stopped.

    `tracked_bytes`, `allocated_bytes` and `planned_bytes` are peaks on the device, over the phases that a plan
    speaks of.
    """
    memory, plan = (_read(directory / name) for name in ("memory.json", PLAN))
    phases = memory.get("phases", [])
    tracked = peaks_of(memory or None)["tracked"].get("device", {})
    foreseen = [phase["device_allocated_bytes"] for phase in phases if phase["phase"] not in NOT_FORESEEN]
    return {
        "windows_done": sum(is_window(phase["phase"]) for phase in phases),
        "tracked_bytes": sum(tracked.values()) or None,
        "allocated_bytes": max((one for one in foreseen if one is not None), default=None),
        "planned_bytes": plan.get("peak_bytes"),
        "flops": plan.get("flops"),
        "work": plan.get("work"),
        "no_plan": plan.get("reason"),
        "phases": [
            {name: phase[name] for name in ("phase", "seconds", "device_allocated_bytes", "categories")}
            for phase in phases
        ],
    }


def _rates(row: Row, place: torch.device, directory: Path) -> dict[str, Any]:
    side = [SIDE[place.type]] * 3
    rates = {"bf16": product_rate(*side, torch.bfloat16, place.type)}
    for name, precision in (("tf32", "high"), ("fp32", "highest")):
        torch.set_float32_matmul_precision(precision)
        rates[name] = product_rate(*side, torch.float32, place.type)
    total = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else None
    return {"rates": rates, "environment": environment(place), "device_bytes": total}


def _command(row: Row, place: torch.device, directory: Path) -> dict[str, Any]:
    from recon.cli.fit import main as recon_fit

    sizes = {"num_sequences": row.num_sequences, "seq_len": row.seq_len, "num_validation": 4, "num_test": 4}
    options = [part for name, value in sizes.items() for part in (f"--data.{name}", str(value))]
    options += ["--trainer.accelerator", place.type, "--trainer.precision", "bf16-mixed", "--summary", "false"]
    recon_fit(["-c", f"scopes/{row.scope}", *options, "--run_dir", str(directory)])
    report = _read(directory / "report.json")
    write_json(directory / PLAN, report["prediction"])
    names = ("seconds", "perplexity", "dense_perplexity", "pruned_perplexity")
    return {name: report[name] for name in names} | facts(directory)


def _fit(row: Row, place: torch.device, directory: Path) -> dict[str, Any]:
    profiled = _profile(row, place)
    scope, data, trainer = _parts(row, place, directory, [MemoryProfiler(print_table=False), profiled])
    write_json(directory / PLAN, forecast(scope, data, trainer, (), masked=True))
    run = RunDirectory(directory, {"row": row.name})
    options = RunOptions(Wanda(), Unstructured(0.5), baselines=False, drift=False)
    job = Job(scope, data, trainer, run, options)
    scope.require_trainer(trainer)
    ranks.start(trainer, scope)
    scope.divide(Share(), assembles=True)
    begin(data, trainer)
    scope.phases, scope.directory = Phases(trainer.callbacks), directory  # pyright: ignore[reportAttributeAccessIssue]
    with scope.phases.run(directory, job.device):
        scope.phases.enter(PhaseName.LOAD)
        scope.load(data)
        selection = select(job)
        scope.phases.enter(PhaseName.PREPARE)
        scope.to(job.device)
        scope.prepare(data, selection.masks, directory)
        seconds = train(job, resumed=False).seconds
    found = {"seconds": seconds - profiled.overhead, "profile": profiled.result()}
    return found | facts(directory)


def _parts(
    row: Row, place: torch.device, directory: Path, callbacks: list[Any]
) -> tuple[Scope, RandomTokens, L.Trainer]:
    shape = row.shape
    options: dict[str, Any] = {"name": "random", "shape": shape, **row.options}
    options["dtype"] = "float32" if row.scope == "full" else "bfloat16"
    if row.scope != "full":
        options["batch_size"] = row.batch_size
    if row.scope != "matrix":
        options |= {"epochs": 1, "lr": 1e-4}
    scope = SCOPES[row.scope](**options)
    if scope.offload == "none":
        scope.source = MadeOnDevice(shape, options["dtype"], place)
    sizes = {"num_sequences": row.num_sequences, "seq_len": row.seq_len, "batch_size": row.batch_size}
    trainer = L.Trainer(
        accelerator=place.type,
        devices=1,
        strategy=STRATEGIES[row.strategy](),
        precision="bf16-mixed",
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
        callbacks=callbacks,
        default_root_dir=str(directory),
    )
    return scope, RandomTokens(shape["vocab_size"], 2 * row.batch_size, **sizes), trainer


def _profile(row: Row, place: torch.device) -> KernelProfile:
    """The windows of the second block, or three steps in which kernels are chosen already."""
    if row.scope == "full":
        return KernelProfile(place, 2, 4)
    of_a_block = 2 if row.scope == "submodule" else 1
    return KernelProfile(place, of_a_block + 1, 2 * of_a_block)


def _read(file: Path) -> Mapping[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}
