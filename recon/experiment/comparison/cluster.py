"""The options of a SLURM cluster: what the job of a cell asks for."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """What the SLURM job of a cell asks for; a cell in several processes gets as many times the devices and memory.

    Args:
        account: Account that the jobs are charged to; the user's default if null.
        partition: Partition that they run in; the cluster's default if null.
        minutes: Time limit of a job. Shortly before it the cell saves its state and is queued again, to go on from it.
        gpus_per_process: GPUs of each process; 0 on a cluster without.
        cpus_per_process: Cores of each process, and its threads unless --threads says otherwise.
        memory_gb: Memory of each process in GB.
        max_jobs: Jobs that are queued or run at a time.
        setup: Lines of shell in front of each cell, such as `module load cuda`.
        options: Other options of sbatch, such as `{qos: long}`.

    Raises:
        ValueError: If a number is too small.
    """

    account: str | None = None
    partition: str | None = None
    minutes: int = 240
    gpus_per_process: int = 1
    cpus_per_process: int = 8
    memory_gb: float = 64.0
    max_jobs: int = 64
    setup: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("minutes", "cpus_per_process", "max_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--cluster.{name} must be at least 1, got {getattr(self, name)}; give a larger one")
        if self.gpus_per_process < 0:
            raise ValueError(
                f"--cluster.gpus_per_process must be at least 0, got {self.gpus_per_process}; give 0 for none"
            )
        if self.memory_gb <= 0:
            raise ValueError(f"--cluster.memory_gb must be above 0, got {self.memory_gb}; give what a cell needs")


def is_of_job(variable: str) -> bool:
    """Whether an environment variable describes the job of this process: what it starts would take it for its own."""
    return variable.startswith("SLURM_") and variable != "SLURM_CONF"
