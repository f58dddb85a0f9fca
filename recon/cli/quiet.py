"""Silence what libraries say for their own sake, so that what recon says can be read."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

CHATTY = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer.connectors",
    "lightning.fabric",
    "lm_eval",
)
"""Loggers of Lightning and lm-evaluation-harness with tips and notices."""

SEEDED = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Variables of the environment that Lightning sets with a seed."""


def quiet() -> None:
    """Turn off progress bars of `datasets` and `transformers`, Lightning's tips, and warnings not for users."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for name in CHATTY:
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


@contextmanager
def unnoticed() -> Iterator[None]:
    """Be quiet until the context ends, then restore warnings, loggers, progress bars and random numbers."""
    import datasets
    import transformers
    from lightning.pytorch.utilities.seed import isolate_rng

    loggers = [logging.getLogger(name) for name in (*CHATTY, "DeepSpeed")]
    held = [(logger.level, list(logger.filters)) for logger in loggers]
    seeds = {name: os.environ.get(name) for name in SEEDED}
    bars = datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    try:
        with isolate_rng(), warnings.catch_warnings():
            quiet()
            yield
    finally:
        for logger, (level, filters) in zip(loggers, held, strict=True):
            logger.setLevel(level)
            logger.filters[:] = filters
        for name, seed in seeds.items():
            os.environ.pop(name, None)
            if seed is not None:
                os.environ[name] = seed
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers.utils.logging.enable_progress_bar()
