"""Silence what libraries say for their own sake, so that what recon says can be read."""

import logging
import os
import warnings


def quiet() -> None:
    """Turn off progress bars of `datasets` and `transformers`, Lightning's tips, and warnings not for users."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators",
        "lightning.pytorch.strategies",
        "lightning.pytorch.trainer.connectors",
        "lightning.fabric",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets the level of its logger itself, when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for message in (
        "LightningCLI's args parameter is intended.*",
        ".*does not have many workers.*",  # data are tensors in memory
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # each process measures windows of its own
        ".*`training_step` returned `None`.*",
        ".*in eval mode at the start of training.*",  # on purpose: dropout stays off
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 with torch 2.13
        ".*configure_optimizers` returned `None`.*",  # on purpose: the matrix scope has none
        ".*smaller than the logging interval.*",
        ".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated.*",  # DeepSpeed 0.19, FSDP2 with torch 2.13
        ".*When saving the DeepSpeed Stage 3 checkpoint.*",  # recon writes the model in one piece itself
    ):
        warnings.filterwarnings("ignore", message)
    if "SLURM_JOB_ID" not in os.environ:  # a machine that has SLURM, outside a job
        warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used.*")
