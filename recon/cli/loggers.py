"""Where loggers write: `save_dir` is within the run directory unless it is absolute, and TensorBoard is the default."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace


def in_run_directory(logger: Any, run_dir: Path, part: str = "") -> Any:
    """The configuration of `trainer.logger`, with its directories in the run's.

    Args:
        logger: As parsed: null (or true) for TensorBoard, false for none, one class or a list of classes.
        run_dir: The run directory.
        part: Of a run that several jobs share: the directory of this job's logs, for they do not share a curve.

    Returns:
        The same, to build from; `logger` itself is left as it was.
    """
    if logger is None or logger is True:
        logger = Namespace(
            class_path="lightning.pytorch.loggers.TensorBoardLogger",
            init_args=Namespace(save_dir="logs", name="", version="", default_hp_metric=False),
        )
    if isinstance(logger, list):
        return [in_run_directory(one, run_dir, part) for one in logger]
    if not logger:
        return False
    resolved = logger.clone()
    save_dir = resolved.init_args.get("save_dir")
    if save_dir is not None:
        resolved.init_args.save_dir = str(run_dir / save_dir / part)
    return resolved
