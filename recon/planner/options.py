"""The options of a run that decide its memory, disk and FLOPs, apart from the model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from recon.basics.units import in_bytes
from recon.calibration.activations import Propagation
from recon.calibration.storage import Place, Storage
from recon.data import TokenData
from recon.models.offload.opening import Offload
from recon.pruning.patterns import Experts, Pattern
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
from recon.scopes.model_loss import LOGITS_MEMORY
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
"""Lightning's name -> its 16-bit type."""


def require_plannable(pattern: Pattern | None) -> None:
    """Refuse a pattern whose recovery cannot be planned.

    Raises:
        ValueError: If it removes whole experts.
    """
    if isinstance(pattern, Experts):
        raise ValueError(
            f"planning knows patterns of weights, whose recovery computes with parameters of the dense shapes, got "
            f"{pattern}; plan with another pattern for a rough bound"
        )


@dataclass(frozen=True)
class PlanOptions:
    """Options under the names that `recon fit` has for them.

    Args:
        scope: The scope.
        batch_size: Sequences per step: `model.batch_size`, in full retraining `data.batch_size` (of each process).
        seq_len: Tokens per sequence.
        num_sequences: Calibration sequences.
        max_tokens: Full retraining: tokens trained on in each epoch; those of the calibration sequences if None.
        max_steps: Full retraining: optimizer steps of all epochs together; as many as the epochs have if None.
        num_validation: Held-out sequences.
        epochs: Passes over the sequences, for each window.
        num_blocks: Blocks a window, in the block scope.
        stride: Blocks from one window's start to the next one's; num_blocks if None.
        groups: Patterns of the matrices recovered together, in place of submodules.
        start: Weights that recovery starts from; `exact` collects Gram matrices and solves.
        propagation: Source of the inputs of a window.
        descent_steps: Steps of AdamW in place of the exact solver, in the matrix scope; 0 for the exact one.
        loss: The loss of the scope.
        parameters: The parameters that learn.
        lora_rank: Rank of the adapters, with `parameters: lora`.
        train: `blocks` or `all`, in full retraining.
        gradient_checkpointing: Keep only the inputs of each block, in full retraining.
        logits_memory: Full retraining: bytes of a batch's fp32 logits above which its loss is computed in chunks.
        accumulate: Batches an optimizer step.
        precision: Lightning's name of the precision.
        sharding: Division of the model among processes.
        reduce_each_batch: FSDP2: gradients are reduced with every accumulated batch, not once a step.
        offload_optimizer: ZeRO: gradients and optimizer state on the host.
        offload_parameters: ZeRO-3: the weights too.
        world_size: Processes; in the local scopes each recovers its share of the windows.
        num_nodes: Machines on which the processes run.
        chooses_start: Whether each window chooses its start, for which the exact one waits on the host.
        searches_rate: Whether learning rates are tried on the first window of each kind.
        offload: Place of the model while a window of it is recovered; in full retraining, outside the fit.
        dtype: Precision in which the model is loaded; that of the planned model if None.
        activations: Place of the hidden states of all sequences between two passes.
        activations_budget: For `auto`: bytes of hidden states on the device.
        activations_host_budget: For `auto`: bytes of hidden states in the host's memory; no limit if None.
        activations_dtype: Precision of the kept hidden states; that of the model if None.
        exclude: Patterns of modules that stay dense.
        masked: Whether anything is pruned.
        prunes_by_gram: Local scopes: whether masks are chosen along with recovery, from Gram matrices.
        device: Kind of the device that computes: AdamW steps differently on them.
        partitioned: Full retraining: ZeRO-3 loads the weights in parts, so that no process has them all.
        evaluates: Whether the plan includes evaluations before and after the fit; a fit's own peak is without them.
        baselines: Whether these include the dense and the pruned model.
        drift: Whether the recovered model is compared with the dense one.
        num_test: Sequences of the split that is evaluated; None for all there are.
        evaluation_batch_size: Sequences per forward pass of an evaluation: `data.batch_size`.
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
    logits_memory: int = in_bytes(LOGITS_MEMORY)
    accumulate: int = 1
    precision: str = "32-true"
    sharding: Sharding = "none"
    reduce_each_batch: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    world_size: int = 1
    num_nodes: int = 1
    chooses_start: bool = False
    searches_rate: bool = False
    offload: Offload = "none"
    dtype: torch.dtype | None = None
    activations: Place = "device"
    activations_budget: int = 0
    activations_host_budget: int | None = None
    activations_dtype: torch.dtype | None = None
    exclude: tuple[str, ...] = ()
    masked: bool = True
    prunes_by_gram: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    partitioned: bool = False
    evaluates: bool = False
    baselines: bool = False
    drift: bool = False
    num_test: int | None = None
    evaluation_batch_size: int = 8
    max_tokens: int | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"planning knows trainer.precision {', '.join(PRECISIONS)}, got {self.precision!r}; choose one of them"
            )

    @property
    def is_local(self) -> bool:
        """Whether the model is recovered window by window."""
        return self.scope != "full"

    @property
    def trained_sequences(self) -> int:
        """Sequences that an epoch trains on."""
        return self.num_sequences if self.max_tokens is None else self.max_tokens // self.seq_len

    @property
    def trained_epochs(self) -> float:
        """Passes over the sequences until the last step, the last one perhaps in part."""
        if self.max_steps is None:
            return float(self.epochs)
        whole, more = divmod(self.max_steps, self.steps_of_epoch)
        return min(float(self.epochs), whole + more * self._sequences_of_step / self.trained_sequences)

    @property
    def steps_of_epoch(self) -> int:
        """Optimizer steps of a pass over the sequences."""
        return math.ceil(self.trained_sequences / self._sequences_of_step)

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs together."""
        most = self.epochs * self.steps_of_epoch
        return most if self.max_steps is None else min(most, self.max_steps)

    @property
    def _sequences_of_step(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    @property
    def train_tokens(self) -> int:
        """Tokens that a training step sees, epochs counted; those of the calibration sequences in the matrix scope."""
        epochs = 1 if self.scope == "matrix" else self.trained_epochs
        return round(epochs * self.trained_sequences * self.seq_len)

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed keeps master weights beside the working ones."""
        return self.sharding.startswith("zero")

    @property
    def gathers_half(self) -> bool:
        """Whether FSDP2 gathers in 16 bits the weights that it has in fp32."""
        return self.sharding == "fsdp2" and self.precision == "bf16-mixed"

    @property
    def half(self) -> torch.dtype | None:
        """The 16-bit type of products; None in fp32."""
        return PRECISIONS[self.precision]

    @property
    def autocasts(self) -> bool:
        """Whether weights are cast at each use; DeepSpeed has cast them before."""
        return self.precision.endswith("-mixed") and not self.is_zero

    @property
    def taps(self) -> bool:
        """Whether attention is recorded."""
        return self.scope == "submodule" and self.groups is None

    @property
    def starts_exact(self) -> bool:
        """Whether matrices are solved for a start."""
        return self.masked and self.start == "exact" and self.scope != "matrix"

    @property
    def collects_for_starts(self) -> bool:
        """Whether Gram matrices are as exact as a start needs them; a criterion needs them in full fp32."""
        return self.starts_exact and not (self.is_local and self.prunes_by_gram)

    @property
    def solves(self) -> bool:
        """Whether matrices are solved on the way."""
        return self.starts_exact or (self.masked and self.scope == "matrix" and not self.descent_steps)

    @property
    def collects(self) -> bool:
        """Whether Gram matrices are collected."""
        return self.masked and (self.solves or self.scope == "matrix" or (self.is_local and self.prunes_by_gram))

    @property
    def crosses(self) -> bool:
        """Whether Gram matrices of dense and recovered inputs together are collected, too."""
        return self.scope == "matrix" and self.propagation == "recovered"

    def weights_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The precision of the working weights of a model whose planned precision is `stored`."""
        stored = self.dtype or stored
        if self.is_local and self.offload != "none":
            return stored  # Lightning, which casts, does not have the model
        cast = self.precision.endswith("-true") or self.is_zero or self.gathers_half
        return self.half if self.half is not None and cast else stored

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: str(one)[6:] if isinstance(one, torch.dtype) else one for name, one in asdict(self).items()}

    @classmethod
    def of(
        cls,
        scope: Scope,
        data: TokenData,
        trainer: Mapping[str, Any] | None = None,
        exclude: tuple[str, ...] = (),
        masked: bool = True,
        prunes_by_gram: bool = False,
    ) -> "PlanOptions":
        """Collect the options of a run, before or after its model is loaded.

        Args:
            scope: The scope.
            data: The data; nothing is read.
            trainer: As `trainer_options` translates them; one process in fp32 if None.
            exclude: See `PlanOptions`.
            masked: See `PlanOptions`.
            prunes_by_gram: See `PlanOptions`.

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
        for name, split in (("num_sequences", "train"), ("num_validation", "validation")):
            if data.num[split] is None:
                raise ValueError(f"planning reads no data and needs a number for data.{name}, got null; give one")
        return cls(
            scope=scope.scope,  # pyright: ignore[reportArgumentType]
            seq_len=data.seq_len,
            num_sequences=data.num["train"],  # pyright: ignore[reportArgumentType]
            num_validation=data.num["validation"],  # pyright: ignore[reportArgumentType]
            epochs=scope.epochs,
            start="exact" if scope.start == "auto" else scope.start,  # pyright: ignore[reportArgumentType]
            exclude=exclude,
            masked=masked,
            num_test=data.num[data.evaluate_on],
            evaluation_batch_size=data.batch_size,
            prunes_by_gram=prunes_by_gram,
            **_of_scope(scope, data),
            **trainer or {},
        )


def _of_scope(scope: Scope, data: TokenData) -> dict[str, Any]:
    """The options of one kind of scope that others do not have."""
    found: dict[str, Any] = {"batch_size": scope.batch_size if isinstance(scope, LocalScope) else data.batch_size}
    found |= {"offload": scope.offload, **_of_storage(scope.storage)}
    if isinstance(scope, LocalScope):
        found["propagation"] = scope.propagation
    if isinstance(scope, Distillation):
        found["searches_rate"] = scope.lr == "auto"
        found["chooses_start"] = scope.start == "auto"
    if isinstance(scope, BlockDistillation):
        found |= {"num_blocks": scope.num_blocks, "stride": scope.stride}
    if isinstance(scope, SubmoduleDistillation) and scope.groups is not None:
        found["groups"] = tuple(tuple(group) for group in scope.groups)
    if isinstance(scope, MatrixReconstruction) and isinstance(scope.solver, GradientDescent):
        found["descent_steps"] = scope.solver.steps
    if isinstance(scope, Distillation | FullRetraining):
        found |= {"loss": scope.loss, "parameters": scope.which_parameters, "lora_rank": scope.lora.rank}
    if isinstance(scope, FullRetraining):
        found |= {"train": scope.train_what, "gradient_checkpointing": scope.gradient_checkpointing}
        found |= {"partitioned": scope.partitioned, "max_tokens": data.max_tokens}
        found["logits_memory"] = scope.logits_memory
    return found


def _of_storage(storage: Storage) -> dict[str, Any]:
    found: dict[str, Any] = {"activations": storage.place, "activations_dtype": storage.dtype}
    if storage.budget is not None:
        host = storage.budget.left["host"]
        found["activations_budget"] = int(storage.budget.left["device"])
        found["activations_host_budget"] = None if math.isinf(host) else int(host)
    return found
