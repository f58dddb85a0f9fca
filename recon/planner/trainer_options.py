"""The options of a plan that a Lightning trainer decides, translated from a trainer or from its configuration."""

from typing import Any, get_args

import lightning as L

from recon.distributed.ranks import layout
from recon.distributed.strategies import WindowParallelStrategy
from recon.planner.options import Sharding

WINDOW_PARALLEL = WindowParallelStrategy.strategy_name

PRECISION_NAMES = {"32": "32-true", "None": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""Short names of a configuration -> names of a trainer."""


def trainer_options(trainer: L.Trainer) -> dict[str, Any]:
    """Translate a trainer, whose processes need not be connected yet.

    Returns:
        Arguments of `PlanOptions`.
    """
    config = getattr(trainer.strategy, "config", None) or {}
    zero = config.get("zero_optimization", {})
    return _translated(
        str(layout(trainer)["strategy"]),
        precision=str(trainer.precision),
        accumulate=trainer.accumulate_grad_batches,
        max_steps=_limit(trainer.max_steps),
        world_size=trainer.num_devices * trainer.num_nodes,
        num_nodes=trainer.num_nodes,
        device="cuda" if trainer.strategy.root_device.type == "cuda" else "cpu",
        reduce_each_batch=getattr(trainer.strategy, "reduce_each_batch", False),
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
    )


def configured_trainer_options(config: Any, is_local: bool) -> dict[str, Any]:
    """Translate the configuration of a trainer. Its devices need not exist here.

    Args:
        config: Options of `lightning.Trainer` as attributes; a strategy is a name, or has `class_path` and `init_args`.
        is_local: Whether the scope is local. A strategy of other scopes is left out, and one process remains.

    Returns:
        Arguments of `PlanOptions`.

    Raises:
        ValueError: If planning does not know the strategy, or the number of devices is open.
    """
    strategy, memory_options = _configured_strategy(config.strategy)
    world_size, num_nodes = _num_devices(config.devices) * config.num_nodes, config.num_nodes
    if (strategy == WINDOW_PARALLEL) != is_local:
        strategy, memory_options, world_size, num_nodes = "none", {}, 1, 1
    return _translated(
        strategy,
        precision=str(config.precision),
        accumulate=config.accumulate_grad_batches,
        max_steps=None if is_local else _limit(config.max_steps),
        world_size=world_size,
        num_nodes=num_nodes,
        device="cpu" if config.accelerator == "cpu" else "cuda",
        reduce_each_batch=memory_options.get("reduce_each_batch", False),
        offload_optimizer=memory_options.get("offload_optimizer", False),
        offload_parameters=memory_options.get("offload_parameters", False),
    )


def _translated(strategy: str, precision: str, **options: Any) -> dict[str, Any]:
    sharding = "ddp" if strategy.startswith("ddp") else strategy.removesuffix("_offload")
    if sharding not in get_args(Sharding):
        options = options | {"offload_optimizer": False, "offload_parameters": False}
        sharding = "none"
    return options | {"precision": PRECISION_NAMES.get(precision, precision), "sharding": sharding}


def _limit(max_steps: int) -> int | None:
    """The number of steps at which a trainer stops; None if it does not."""
    return None if max_steps == -1 else max_steps


def _configured_strategy(strategy: Any) -> tuple[str, dict[str, bool]]:
    """Name the strategy of a configuration as a trainer names it, and list its options that cost or save memory."""
    if strategy is None or isinstance(strategy, str):
        return strategy or "none", {}
    kind, options = strategy.class_path.rpartition(".")[2], strategy.init_args
    if kind == "WindowParallelStrategy":
        return WINDOW_PARALLEL, {}
    if kind == "FullyShardedStrategy":
        return "fsdp2", {"reduce_each_batch": bool(options["reduce_each_batch"])}
    if kind != "ZeroStrategy":
        raise ValueError(
            f"planning knows ddp, window_parallel, recon.strategies.ZeroStrategy and FullyShardedStrategy, got "
            f"{strategy.class_path}; choose one of configs/strategies"
        )
    return f"zero{options.stage}", {name: bool(options[name]) for name in ("offload_optimizer", "offload_parameters")}


def _num_devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ValueError(f"planning needs a number of trainer.devices, got {devices!r}; give one")
