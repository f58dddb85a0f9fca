"""The processes of a run: started and connected before anything heavy happens, one of them ahead where needed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from recon.basics.children import parent_of_children

PATIENCE = timedelta(days=7)
"""How long ranks wait while rank 0 prunes or evaluates; if it dies they notice at once."""


GOODBYE = 60.0
"""Seconds for the other processes to end after this one has; they have nothing left to do then."""


def rank() -> int:
    """This process's rank, known from its environment before the processes are connected; 0 of one."""
    return rank_zero_only.rank or 0


def size() -> int:
    """How many processes are connected."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Start the run's other processes, unless torchrun or SLURM did, and connect them.

    Lightning would do this in `fit`; a run prunes and measures before, on one rank while the others wait.

    Raises:
        ValueError: If SLURM or torchrun started another number of processes than the trainer was asked for. Lightning
            would go on with those that there are.
    """
    asked = trainer.num_devices * trainer.num_nodes
    require_started(trainer, asked)
    if trainer.world_size == 1 and asked == 1:
        accelerator = trainer.strategy.accelerator
        assert accelerator is not None
        accelerator.setup_device(trainer.strategy.root_device)  # or GPU 0 would be measured until the fit
        return
    strategy = trainer.strategy
    strategy.connect(module)
    if strategy.launcher is not None:
        with parent_of_children():
            strategy.launcher.launch(lambda: None, trainer=trainer)
    strategy.setup_environment()
    if size() != asked:
        raise ValueError(_other_number(asked, size(), "this environment"))


def require_started(trainer: L.Trainer, asked: int) -> None:
    """Refuse processes that were started from outside in another number than `asked`.

    Raises:
        ValueError: Naming both numbers, with the cure.
    """
    environment: ClusterEnvironment = trainer._accelerator_connector.cluster_environment
    if not environment.creates_processes_externally:
        return
    if (started := environment.world_size()) != asked:
        raise ValueError(_other_number(asked, started, type(environment).__name__.removesuffix("Environment")))
    if isinstance(environment, SLURMEnvironment) and asked > 1 and "SLURM_STEP_ID" not in os.environ:
        raise ValueError(
            f"{asked} processes need to be started by srun within the job, got one that was not: it would wait for the "
            f"others; put srun before the command"
        )


def _other_number(asked: int, started: int, where: str) -> str:
    return (
        f"trainer.devices and trainer.num_nodes make {asked} processes, got {started} from {where}; ask SLURM for as "
        f"many (--nodes, --ntasks-per-node, and srun before the command) or torchrun (--nproc-per-node), or set both "
        f"options to what there is. In a SLURM job of one task named `interactive` (--job-name=interactive) the "
        f"processes of one node are started here"
    )


def finish(trainer: L.Trainer) -> None:
    """Let the processes that `start` has started end before this one, whose end would end them."""
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        try:
            process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            process.kill()


def layout(trainer: L.Trainer) -> dict[str, Any]:
    """How many processes train, how the strategy shares the model out among them, and in which precision."""
    kind = type(trainer.strategy).__name__.removesuffix("Strategy").lower()
    return {
        "processes": size(),
        "strategy": getattr(trainer.strategy, "strategy_name", kind),
        "precision": str(trainer.precision),
    }


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks, in which they wait for each other as long as it takes; each of them has to call this."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 goes through the block while the others wait at its start; then they go through it."""
    if size() == 1:
        yield
        return
    group = patient_group()
    if rank() != 0:
        _wait(group)
    yield
    if rank() == 0:
        dist.barrier(group)


def meet() -> None:
    """Wait for all ranks to come here."""
    if size() > 1:
        _wait(patient_group())


def _wait(group: dist.ProcessGroup) -> None:
    try:
        dist.barrier(group)
    except RuntimeError:
        sys.exit(1)  # another process is gone and has said why


def any_rank(value: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether `value` is true on any rank.

    Args:
        value: Of this rank.
        group: All ranks, on the host: a device would be waited for. None if there is one rank.
    """
    if group is None:
        return value
    tensor = torch.tensor(int(value))
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return bool(tensor.item())


def gathered(value: object) -> list:
    """`value` of every rank, in the order of ranks, on every rank."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value)
    return values
