"""The options of a run that decide what it needs, apart from the model."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch

from recon.calibration.activations import Propagation
from recon.calibration.storage import Place, Storage
from recon.data import TokenData
from recon.distributed.ranks import layout
from recon.models.offload.opening import Offload
from recon.scopes import (
    BlockDistillation,
    FullRetraining,
    MatrixReconstruction,
    Pretraining,
    Scope,
    SubmoduleDistillation,
)
from recon.scopes.base import StartName
from recon.scopes.distillation import Distillation
from recon.scopes.local.module import LocalScope
from recon.scopes.trainable import Parameters
from recon.solvers import GradientDescent

ScopeName = Literal["matrix", "submodule", "block", "full"]
Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
SCOPES: tuple[ScopeName, ...] = get_args(ScopeName)

PRECISIONS: dict[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
"""Lightning's name -> the 16-bit type in it."""


@dataclass(frozen=True)
class Setting:
    """Options under the names that `recon fit` has for them.

    Args:
        scope: Which scope.
        batch_size: Sequences per step: `model.batch_size`, in full retraining `data.batch_size` (of each process).
        seq_len: Tokens per sequence.
        num_sequences: Calibration sequences.
        num_validation: Held-out sequences.
        epochs: Passes over the calibration sequences, for each window.
        num_blocks: Blocks a window, in the block scope.
        stride: Blocks from one window's start to the next one's; num_blocks if None.
        groups: Patterns of the matrices recovered together, in place of submodules.
        start: Where recovery starts from; `exact` collects Gram matrices and solves.
        propagation: What enters a window.
        descent_steps: Steps of AdamW in place of the exact solver, in the matrix scope; 0 for the exact one.
        loss: As the scope has it.
        parameters: What learns.
        lora_rank: Rank of the adapters, with `parameters: lora`.
        train: `blocks` or `all`, in full retraining.
        gradient_checkpointing: Keep only what enters each block, in full retraining.
        accumulate: Batches an optimizer step.
        precision: Lightning's name.
        sharding: How processes share the model.
        offload_optimizer: ZeRO: gradients and optimizer state on the host.
        offload_parameters: ZeRO-3: the weights too.
        world_size: Processes; in the local scopes each recovers its share of the windows.
        num_nodes: Machines that they run on.
        offload: Local scopes: where the model is while a window of it is recovered.
        dtype: In which precision the model is loaded, if not in that which it is planned in.
        activations: Local scopes: where the hidden states of all sequences are between two passes.
        activations_budget: For `auto`: bytes that they may take on the device.
        activations_host_budget: For `auto`: bytes that they may take of the host's memory; no limit if None.
        activations_dtype: In which precision they are kept; that of the model if None.
        exclude: Patterns of modules that stay dense.
        masked: Whether anything is pruned.
        device: What kind of device computes: AdamW steps differently on them.
    """

    scope: ScopeName
    batch_size: int = 8
    seq_len: int = 256
    num_sequences: int = 128
    num_validation: int = 16
    epochs: int = 4
    num_blocks: int = 1
    stride: int | None = None
    groups: tuple[tuple[str, ...], ...] | None = None
    start: StartName = "exact"
    propagation: Propagation = "dense"
    descent_steps: int = 0
    loss: str = "normalised"
    parameters: Parameters = "all"
    lora_rank: int = 16
    train: Literal["blocks", "all"] = "blocks"
    gradient_checkpointing: bool = False
    accumulate: int = 1
    precision: str = "32-true"
    sharding: Sharding = "none"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    world_size: int = 1
    num_nodes: int = 1
    offload: Offload = "none"
    dtype: torch.dtype | None = None
    activations: Place = "device"
    activations_budget: int = 0
    activations_host_budget: int | None = None
    activations_dtype: torch.dtype | None = None
    exclude: tuple[str, ...] = ()
    masked: bool = True
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"planning knows trainer.precision {', '.join(PRECISIONS)}, got {self.precision!r}; choose one of them"
            )
        if not self.is_local and self.offload != "none":
            raise ValueError(
                f"offload: {self.offload} is that of the local scopes; for full retraining choose "
                f"-c strategies/zero2_offload or -c strategies/zero3_offload"
            )

    @property
    def is_local(self) -> bool:
        """Whether the model is recovered window by window."""
        return self.scope != "full"

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed keeps master weights beside the working ones."""
        return self.sharding.startswith("zero")

    @property
    def half(self) -> torch.dtype | None:
        """The 16-bit type that products are computed in, if there is one."""
        return PRECISIONS[self.precision]

    @property
    def autocasts(self) -> bool:
        """Whether weights are cast as they are used; DeepSpeed has cast them before."""
        return self.precision.endswith("-mixed") and not self.is_zero

    @property
    def taps(self) -> bool:
        """Whether attention is recorded."""
        return self.scope == "submodule" and self.groups is None

    @property
    def solves(self) -> bool:
        """Whether matrices are solved exactly on the way."""
        return self.masked and (self.start == "exact" or (self.scope == "matrix" and not self.descent_steps))

    @property
    def collects(self) -> bool:
        """Whether Gram matrices are collected."""
        return self.masked and (self.solves or self.scope == "matrix")

    @property
    def crosses(self) -> bool:
        """Whether Gram matrices of dense and recovered inputs together are collected, too."""
        return self.scope == "matrix" and self.propagation == "recovered"

    def weights_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The precision of the working weights of a model that is planned in `stored`."""
        stored = self.dtype or stored
        if self.offload != "none":
            return stored  # Lightning, which casts, does not have the model
        cast = self.precision.endswith("-true") or self.is_zero
        return self.half if self.half is not None and cast else stored

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: str(one)[6:] if isinstance(one, torch.dtype) else one for name, one in asdict(self).items()}

    @classmethod
    def of(
        cls,
        scope: Scope,
        data: TokenData,
        trainer: L.Trainer | None = None,
        exclude: tuple[str, ...] = (),
        masked: bool = True,
    ) -> "Setting":
        """The setting of a run that is built, before or after its model is loaded.

        Args:
            scope: Its scope.
            data: Its data; nothing is read.
            trainer: Its trainer; one process in fp32 if None.
            exclude: See `Setting`.
            masked: See `Setting`.

        Raises:
            ValueError: If the scope cannot be planned, or the number of sequences is open.
        """
        if isinstance(scope, Pretraining) or scope.scope not in SCOPES:
            raise ValueError(
                f"planning knows the scopes {', '.join(SCOPES)}, got {type(scope).__name__}; choose one of them"
            )
        if isinstance(scope, FullRetraining) and not issubclass(scope.optimizer_kind, torch.optim.Adam):
            raise ValueError(
                f"planning knows the optimizer state of Adam and AdamW, got {scope.optimizer_kind.__name__}; leave out "
                f"--optimizer"
            )
        amounts = {f"num_{'sequences' if split == 'train' else split}": data.num[split] for split in data.num}
        for name in ("num_sequences", "num_validation"):
            if amounts[name] is None:
                raise ValueError(f"planning reads no data and needs a number for data.{name}, got null; give one")
        options: dict[str, Any] = {
            "batch_size": scope.batch_size if isinstance(scope, LocalScope) else data.batch_size,
            "num_sequences": amounts["num_sequences"],
            "num_validation": amounts["num_validation"],
        }
        if isinstance(scope, LocalScope):
            options |= {"propagation": scope.propagation, "offload": scope.offload}
            options |= _of_storage(scope.storage)
        if isinstance(scope, BlockDistillation):
            options |= {"num_blocks": scope.num_blocks, "stride": scope.stride}
        if isinstance(scope, SubmoduleDistillation) and scope.groups is not None:
            options["groups"] = tuple(tuple(group) for group in scope.groups)
        if isinstance(scope, MatrixReconstruction) and isinstance(scope.solver, GradientDescent):
            options["descent_steps"] = scope.solver.steps
        if isinstance(scope, Distillation | FullRetraining):
            options |= {"loss": scope.loss, "parameters": scope.which_parameters, "lora_rank": scope.lora.rank}
        if isinstance(scope, FullRetraining):
            options |= {"train": scope.train_what, "gradient_checkpointing": scope.gradient_checkpointing}
        if trainer is not None:
            options |= _of_trainer(trainer)
        return cls(
            scope=scope.scope,  # pyright: ignore[reportArgumentType]
            seq_len=data.seq_len,
            epochs=scope.epochs,
            start=scope.start,  # pyright: ignore[reportArgumentType]
            exclude=exclude,
            masked=masked,
            **options,
        )


def _of_storage(storage: Storage) -> dict[str, Any]:
    options: dict[str, Any] = {"activations": storage.place, "activations_dtype": storage.dtype}
    if storage.budget is not None:
        host = storage.budget.left["host"]
        options["activations_budget"] = int(storage.budget.left["device"])
        options["activations_host_budget"] = None if math.isinf(host) else int(host)
    return options


def _of_trainer(trainer: L.Trainer) -> dict[str, Any]:
    name = str(layout(trainer)["strategy"])
    return {
        "precision": str(trainer.precision),
        "accumulate": trainer.accumulate_grad_batches,
        "world_size": trainer.num_devices * trainer.num_nodes,
        "num_nodes": trainer.num_nodes,
        "device": "cuda" if trainer.strategy.root_device.type == "cuda" else "cpu",
        **sharding_of(name, getattr(trainer.strategy, "config", None)),
    }


def sharding_of(name: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The part of a setting that a strategy's name tells, such as `zero3_offload`; and DeepSpeed's config, if any."""
    sharding = name.removesuffix("_offload")
    if sharding not in get_args(Sharding):
        return {"sharding": "none"}
    zero = (config or {}).get("zero_optimization", {})
    return {
        "sharding": sharding,
        "offload_optimizer": "offload_optimizer" in zero or (config is None and name.endswith("_offload")),
        "offload_parameters": "offload_param" in zero or (config is None and name == "zero3_offload"),
    }
