"""Options of tasks, which the commands that measure models share."""

from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from recon.cli.errors import usage
from recon.evaluation.tasks.options import TaskOptions
from recon.evaluation.tasks.suite import Suite

TASK_OPTIONS = tuple(field.name for field in fields(TaskOptions))
"""Their names."""


def add_task_arguments(parser: ArgumentParser) -> None:
    """Add `tasks` and the options of how they are asked."""
    parser.add_class_arguments(TaskOptions)


def tasks_of(config: Any) -> TaskOptions:
    """The tasks of a command that has these options.

    Raises:
        UsageError: If a number is too small, or a task is named twice.
    """
    with usage():
        return TaskOptions(**{name: config[name] for name in TASK_OPTIONS})


def suite_of(config: Any) -> Suite:
    """As `tasks_of`, to be loaded and scored."""
    return Suite(tasks_of(config))


def identity_of_tasks(config: Any) -> dict[str, Any]:
    """The tasks of a command, for a fingerprint: nothing without tasks, so that runs without them keep theirs.

    Raises:
        UsageError: If lm-evaluation-harness is not installed, or the file of a task is not there.
    """
    with usage():
        options = tasks_of(config)
        return {"tasks": options.identity()} if options.names else {}
