"""The tasks that a model is scored on, by name, before lm-evaluation-harness is imported."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from recon.basics.digests import sha256_of

SHIPPED = Path(__file__).parent
"""Directory of the tasks that need no network."""

LOCAL = re.compile(r".*(/.*|\.ya?ml)", re.DOTALL)
"""Names that mean a file."""


@dataclass(frozen=True)
class TaskOptions:
    """The tasks of lm-evaluation-harness that a model is scored on.

    Args:
        tasks: Tasks to score, with commas between or as a list: names of lm-evaluation-harness, `identifiers` (ships
            with recon, needs no network), or YAML files in its format; none if null.
        num_fewshot: Solved examples in front of each question; the number of each task if null.
        task_batch_size: Sequences per forward pass of a task.
        limit: Number of documents per task, the first ones; all if null.

    Raises:
        ValueError: If a number is too small, or a task is named twice.
    """

    tasks: list[str] | str | None = None
    num_fewshot: int | None = None
    task_batch_size: int = 16
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_fewshot", self.num_fewshot, 0),
            ("task_batch_size", self.task_batch_size, 1),
            ("limit", self.limit, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"--tasks needs different tasks, got {twice[0]} twice; name it once")

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, one by one."""
        given = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks or []
        return tuple(name.strip() for name in given if name.strip())

    def identity(self) -> dict[str, Any]:
        """What decides the scores of a model, for the fingerprint of a run; a file counts by its content.

        Raises:
            ValueError: If lm-evaluation-harness is not installed, or there is no such file.
        """
        return {
            "names": [Path(name).name for name in self.names],  # of a file: its content counts, not its place
            "files": [sha256_of(one) for name in self.names if (file := file_of(name)) for one in _read_by(file)],
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "lm_eval": harness_version(),
        }


def file_of(name: str) -> Path | None:
    """The YAML file of a task that is local, or ships; None for a task of lm-evaluation-harness.

    Raises:
        ValueError: If a path leads to no file.
    """
    if not _is_local(name):
        shipped = SHIPPED / f"{name}.yaml"
        return shipped if shipped.is_file() else None
    file = Path(name).expanduser()
    if not file.is_file():
        raise ValueError(
            f"--tasks needs names of tasks, or YAML files in the format of lm-evaluation-harness, got {name}, which is "
            f"no file; correct the path"
        )
    return file


def group_in(file: Path) -> str | None:
    """The name of the group of tasks that a YAML file defines; None if it defines a task.

    Raises:
        ValueError: If it is no YAML file, or holds no options.
    """
    return _content(file).get("group")


def shipped() -> list[str]:
    """The names of the tasks that ship."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def harness_version() -> str:
    """The version of lm-evaluation-harness.

    Raises:
        ValueError: If it is not installed, or cannot run models.
    """
    try:
        version("accelerate")  # which the harness imports, but does not require
        return version("lm_eval")
    except PackageNotFoundError as missing:
        raise ValueError(
            f"--tasks needs lm-evaluation-harness (the packages lm-eval and accelerate), got no {missing.name}; "
            f"install the extra `eval` (pip install 'recon-llm[eval]'; in a clone -e '.[eval]'), or ask for no tasks: "
            f"--tasks null"
        ) from None


class _Loader(yaml.SafeLoader):
    """Reads the YAML of a task without importing the functions that it names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read_by(file: Path) -> Iterator[Path]:
    """The YAML file of a task, with the files that it includes, and its local data."""
    yield file
    content = _content(file)
    for name in _texts(content.get("include")):
        if (included := file.parent / name).is_file():
            yield from _read_by(included)
    kwargs = content.get("dataset_kwargs")
    data = _texts(kwargs.get("data_files")) if isinstance(kwargs, dict) else []
    yield from (Path(name) for name in data if Path(name).is_file())


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        content = " ".join(str(error).split())
    if not isinstance(content, dict):
        raise ValueError(
            f"--tasks needs YAML files in the format of lm-evaluation-harness, got {file}: {content}; correct it"
        )
    return content


def _texts(value: Any) -> list[str]:
    """The texts in nested lists and dictionaries."""
    if isinstance(value, dict | list):
        return [text for one in (value.values() if isinstance(value, dict) else value) for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def _is_local(name: str) -> bool:
    return LOCAL.fullmatch(name) is not None
