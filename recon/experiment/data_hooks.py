"""Hooks of a data module that run outside Lightning's fit: pruning and evaluation ask for tokens, too."""

import lightning as L

from recon.distributed import ranks


def begin(data: L.LightningDataModule, trainer: L.Trainer | None = None) -> None:
    """Call `prepare_data`, in one process or in one of each node, and then `setup` in all of them.

    Args:
        data: The data module.
        trainer: Of the run, whose processes are connected; None without one.
    """
    data.trainer = trainer
    local_rank = 0 if trainer is None else trainer.local_rank
    if (local_rank if data.prepare_data_per_node else ranks.rank()) == 0:
        data.prepare_data()
    ranks.meet()
    for stage in ("fit", "test"):
        data.setup(stage)
