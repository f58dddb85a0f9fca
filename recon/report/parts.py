"""The forms of what reports and `memory.json` hold in dictionaries, as far as tables and pictures read them.

Keys that are not named here are kept as they are.
"""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from recon.basics.files import read_json

OPEN = ConfigDict(strict=True, extra="allow")

Sides: TypeAlias = dict[str, dict[str, int]]
"""Side -> bytes of each category."""


@with_config(OPEN)
class Moment(TypedDict):
    """When a peak was."""

    stage: str | None


@with_config(OPEN)
class MeasuredPhase(TypedDict):
    """One of the `phases` of `memory.json`."""

    phase: str
    seconds: float
    host_bytes: int
    device_allocated_bytes: int | None
    categories: NotRequired[Sides]
    moment: NotRequired[dict[str, Moment]]


@with_config(OPEN)
class MemoryFile(TypedDict):
    """The content of `memory.json`."""

    phases: list[MeasuredPhase]
    baseline_host_bytes: int
    device: NotRequired[str]


@with_config(OPEN)
class MeasuredRank(TypedDict, total=False):
    """One of a report's `ranks`."""

    peak_host_bytes: int | None
    peak_device_bytes: int | None
    baseline_host_bytes: int | None
    weights_bytes: int | None
    gradients_bytes: int | None
    optimizer_bytes: int | None
    on_host_bytes: int | None
    tracked: Sides


@with_config(OPEN)
class Predicted(TypedDict):
    """A report's `prediction`, of a run that was planned."""

    setting: dict[str, Any]
    categories: dict[str, int]
    host: dict[str, int]
    flops: int
    seconds: float | None


@with_config(OPEN)
class NotPredicted(TypedDict):
    """A report's `prediction`, of a run that could not be planned."""

    reason: str


Quantity = Literal["tokens", "flops", "seconds"]
"""What a comparison can hold equal."""


@with_config(OPEN)
class Budget(TypedDict):
    """A report's `budget`, of a row whose cost a comparison held equal."""

    quantity: Quantity
    limit: float
    of: str
    planned: float
    options: dict[str, int]


@with_config(OPEN)
class MeasuredDrift(TypedDict):
    """A report's `drift`."""

    hidden: list[float | None]
    kl: float | None


@with_config(OPEN)
class TriedPoint(TypedDict):
    """One of a report's `tuning`."""

    options: dict[str, Any]
    perplexity: float | None
    seconds: float | None
    chosen: bool
    error: NotRequired[str]


@with_config(OPEN)
class TriedRate(TypedDict):
    """One of the `tried` of a `SearchedRate`."""

    lr: float
    error: float | None


@with_config(OPEN)
class SearchedRate(TypedDict):
    """One of a report's `rates`."""

    lr: float
    steps: int
    tried: list[TriedRate]


@with_config(OPEN)
class Metric(TypedDict):
    """One of the `metrics` of a `TaskScore`."""

    value: float | None
    stderr: float | None


@with_config(OPEN)
class TaskScore(TypedDict):
    """One of a report's `tasks`."""

    main: str | None
    metrics: dict[str, Metric]
    num_documents: int
    num_fewshot: int | None


@with_config(OPEN)
class Parent(TypedDict):
    """One of a report's `parents`."""

    run_dir: str
    label: str
    seed: int
    perplexity: float | None
    share: NotRequired[float]
    validation: NotRequired[float | None]


@with_config(ConfigDict(strict=True, extra="forbid"))
class Reference(TypedDict, total=False):
    """One of a report's `references`: fields of the report of a model that the run was compared with."""

    sparsity: float | None
    model_sparsity: float | None
    disk_bytes: int | None
    tasks: dict[str, TaskScore]


@with_config(ConfigDict(extra="forbid"))
class Nothing(TypedDict):
    """What was not measured."""


PARTS: dict[str, TypeAdapter[Any]] = {
    "ranks": TypeAdapter(list[MeasuredRank]),
    "references": TypeAdapter(dict[Literal["dense", "pruned"], Reference]),
    "drift": TypeAdapter(Nothing | MeasuredDrift),
    "budget": TypeAdapter(Nothing | Budget),
    "prediction": TypeAdapter(Nothing | NotPredicted | Predicted),
    "losses": TypeAdapter(dict[Literal["model", "dense", "pruned"], list[float]]),
    "parents": TypeAdapter(list[Parent]),
    "rates": TypeAdapter(dict[str, SearchedRate]),
    "tuning": TypeAdapter(list[TriedPoint]),
    "tasks": TypeAdapter(dict[str, TaskScore]),
}
"""Field of a report -> its form."""

MEMORY: TypeAdapter[Any] = TypeAdapter(MemoryFile)


def load_memory(file: Path) -> dict[str, Any]:
    """Read a `memory.json`.

    Raises:
        ValueError: If it is none, naming it and the first value at fault.
    """
    cure = "run again with callbacks.MemoryProfiler, or read it with the version of recon that wrote it"
    content = read_json(file, dict, "`recon report --memory`", cure)
    try:
        MEMORY.validate_python(content)
    except ValidationError as error:
        fault = first_fault(error)
        raise ValueError(f"{file} must be as callbacks.MemoryProfiler writes it, got {fault}; {cure}") from None
    for index, phase in enumerate(content["phases"]):
        if lost := phase.get("categories", {}).keys() - phase.get("moment", {}).keys():
            raise ValueError(
                f"{file} must have the moment of each peak, got none at `phases.{index}.moment.{min(lost)}`; {cure}"
            )
    return content


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found: its place, the requirement, and the value."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(one) for one in fault["loc"])
    got = "" if fault["type"] == "missing" else f", got {str(fault['input'])[:60]!r}"
    return f"`{place}`: {fault['msg'].replace('Input should be', 'must be')}{got}"
