"""What goes wrong while the classes of a configuration are built, in words for users."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

NOT_INSTALLED = re.compile(r"(?:Requirement '|No module named ')([A-Za-z0-9_-]+)")
"""How libraries say that a package is missing."""

OF_THE_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision")
"""Options of a trainer that need hardware."""


@contextmanager
def packages() -> Iterator[None]:
    """Make what a class says of a package that is not installed a `ValueError`.

    Raises:
        ValueError: Naming the package; or that a SLURM job was asked for in another way.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if (found := NOT_INSTALLED.search(str(error))) is None:
            raise
        raise ValueError(
            f"the configuration names a class that needs the package {found[1]}, which is not installed; install "
            f"it (pip install {found[1]}), or leave out what names the class"
        ) from error
    except RuntimeError as error:
        if "SLURM" not in str(error):
            raise
        raise ValueError(str(error)) from error  # that the job was asked for with --ntasks


@contextmanager
def trainer_of(options: Namespace) -> Iterator[None]:
    """Make what Lightning says of a trainer that cannot be made a `ValueError`.

    Args:
        options: Of the trainer.

    Raises:
        ValueError: If this machine lacks the devices, or options contradict.
    """
    try:
        yield
    except (MisconfigurationException, TypeError, ValueError) as error:
        given = ", ".join(f"trainer.{name}: {options[name]}" for name in OF_THE_MACHINE)
        raise ValueError(
            f"the trainer needs options that fit together and this machine, got {given}: {error}; correct them, or "
            f"leave them out to run in one process on what is there"
        ) from error


def require_devices(options: Namespace) -> None:
    """Refuse a trainer whose devices this machine lacks, without the cost of its strategy.

    Args:
        options: Of the trainer.

    Raises:
        ValueError: Naming the options, or a package that they need.
    """
    with packages(), trainer_of(options):
        L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            plugins=[LightningEnvironment()],  # that of a job belongs to the command, not to what it starts
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
