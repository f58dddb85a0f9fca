"""Scores on tasks within a run: checked early, measured once, kept in the run directory until the report is written."""

import logging
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from recon.basics.files import read_json, write_json
from recon.evaluation.tasks.suite import Suite
from recon.experiment.directory import DELETE_FILE, RunDirectory
from recon.experiment.opened import OpenModel
from recon.models.offload.opening import Offload

log = logging.getLogger("recon")

Subject = Literal["model", "dense", "pruned", "recovered"]

Scores = dict[str, dict[str, Any]]
"""Name of each task -> its scores, as `Report.tasks` has them."""


def require_scorable(suite: Suite, offload: Offload, loads_whole: bool = True) -> None:
    """Refuse tasks that cannot be scored, and load their documents; nothing happens without tasks.

    Args:
        suite: The tasks.
        offload: Place of the model.
        loads_whole: Whether one process loads the whole model.

    Raises:
        ValueError: With the cure.
    """
    if not suite.options.names:
        return
    if offload != "none" or not loads_whole:
        place = f"model.offload: {offload}" if offload != "none" else "model.partitioned: true"
        raise ValueError(
            f"--tasks needs the whole model on one device, got {place}; leave out --tasks, and score the written model "
            f"where it fits: recon test <run_dir> --tasks {','.join(suite.options.names)}"
        )
    suite.load()


def score_tasks(
    suite: Suite, model: OpenModel, tokenizer: PreTrainedTokenizerBase, subject: Subject, run: RunDirectory | None
) -> Scores:
    """The scores of a model on all tasks; those that an earlier start of the run has measured are read.

    Args:
        suite: The tasks.
        model: On the device.
        tokenizer: Its tokenizer.
        subject: Which model of the run it is; `model` where there is no other.
        run: Keeps the scores; None if nothing does.
    """
    known: dict[str, dict[str, Scores]] = {}
    if run is not None and suite.options.names and run.manifest.is_intact(run.task_scores):
        known = read_json(run.task_scores, dict, "a run with tasks", DELETE_FILE)
    measured = known.setdefault(subject, {})
    for name in suite.options.names:
        if name not in measured:
            log.info(f"score {subject} on {name}")
            measured[name] = suite.score(name, model.model, tokenizer)
            if run is not None:
                write_json(run.task_scores, known, run.manifest.writing)
    return {title: score for name in suite.options.names for title, score in measured[name].items()}
