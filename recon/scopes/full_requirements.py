"""What full retraining refuses: options that do not go together, and trainers under which it cannot train one model."""

import lightning as L
from lightning.pytorch.utilities import GradClipAlgorithmType

from recon.distributed.ranks import layout
from recon.distributed.strategies import WindowParallelStrategy, ZeroStrategy


def require_together(train: str, parameters: str, partitioned: bool, start: str, offload: str) -> None:
    """Refuse options of `FullRetraining` that contradict each other.

    Raises:
        ValueError: Naming them, with the cure.
    """
    if train == "all" and parameters in ("weights", "lora"):
        raise ValueError(
            f"model.parameters: {parameters} learns matrices in the blocks, got model.train: all, which would add "
            f"embeddings and head; set model.train: blocks, or model.parameters: all"
        )
    if start == "auto":
        raise ValueError(
            "model.start: auto compares the starts of each window, got full retraining, which has none; choose "
            "model.start: pruned, moved or exact"
        )
    if partitioned and start == "exact" and offload == "none":
        raise ValueError(
            "model.start: exact solves on the whole model, which model.partitioned never loads; choose "
            "model.offload: disk, model.start: pruned, or moved with the masks of a criterion that moves weights"
        )


def require_one_model(trainer: L.Trainer, scope: str, partitioned: bool) -> None:
    """Refuse a strategy that trains no single model in all processes, or cannot load it in parts as asked.

    Raises:
        ValueError: Naming the strategy, with the cure.
    """
    strategy = trainer.strategy
    if isinstance(strategy, WindowParallelStrategy):
        raise ValueError(
            f"window_parallel gives each process windows of its own, got the {scope} scope, which has none; "
            f"choose strategies/ddp, or a local scope"
        )
    if partitioned and not (isinstance(strategy, ZeroStrategy) and strategy.stage == 3):
        raise ValueError(
            f"model.partitioned needs a strategy that loads weights in parts, strategies/zero3 or "
            f"strategies/zero3_offload, got {layout(trainer)['strategy']}"
        )


def require_clipping_by_norm(trainer: L.Trainer) -> None:
    """Refuse to clip gradients by their value under DeepSpeed.

    Raises:
        ValueError: Naming the strategy, with the cure.
    """
    by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
    if by_value and isinstance(trainer.strategy, ZeroStrategy):
        raise ValueError(
            f"DeepSpeed clips gradients by their norm, got trainer.gradient_clip_algorithm: value with strategy "
            f"{layout(trainer)['strategy']}; choose norm, or strategies/fsdp2"
        )
