"""`Report`, the measurements of one run, and `Results`, the reports of one comparison; pydantic models <-> JSON.

The JSON is strict: it holds no NaN or Infinity. A number that is not finite is written as null. A perplexity that is
not finite (a diverged recovery) counts as not measured: it is None in memory too, so that the table right after a run
and the table from its file agree.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    computed_field,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from recon.basics.files import Writer, atomic_write, write_json
from recon.report.parts import PARTS, first_fault
from recon.report.reading import find_results, read_strict, validated
from recon.report.task_scores import deltas, mean_of

SCOPES = ("dense", "sparse", "pruned", "matrix", "submodule", "block", "full")
"""Subjects of reports, in the order of tables: three models without recovery, then the recovery scopes."""


class Report(BaseModel):
    """The measurements of one run, which is one cell of a comparison.

    Args:
        scope: One of `SCOPES`. `sparse` is a model that had zeros in its linear maps before recon saw it.
        model: Name or path of the dense model.
        criterion: Name of the criterion that chose the weights to keep. The dense cell carries its comparison's, so
            that it stands in the table of the cells compared with it; likewise `pattern`.
        pattern: The allowed zeros, e.g. "2:4".
        seed: Seed of the run.
        text: Name of the calibration text where a comparison has several; else empty.
        label: Name of its row, e.g. "block x2"; the scope if empty.
        perplexity: After the recovery; None if not measured or not finite.
        dense_perplexity: Of the model before pruning, measured alike.
        pruned_perplexity: Of the model after pruning and before recovery, measured alike.
        sparsity: Share of zeros among the prunable weights, 0 to 1; None if the run failed before.
        model_sparsity: Share of zeros among all parameters of the model, 0 to 1; None if not counted.
        disk_bytes: Size of the directory of the written model; None if none was written.
        mask_violations: Number of pruned weights that are not zero; None if not counted.
        peak_host_bytes: Peak resident memory of the process.
        peak_device_bytes: Peak memory allocated on the accelerator; None without one.
        baseline_host_bytes: Resident memory with the libraries loaded, before the model.
        seconds: Wall time of the recovery alone, without loading, pruning and evaluation; of all starts of a resumed
            run. `environment.seconds_at_least` says if a start was killed, so that its last seconds are missing.
        train_tokens: Tokens that went through a training step, epochs counted, in all starts of a resumed run.
        status: "ok" or "failed".
        error: The reason of a failure.
        run_dir: Directory of the run.
        protocol: How perplexity was measured: split, num_sequences, seq_len, tokens_scored, ...
        environment: Where: device name, torch version, date, processes, strategy, ...
        ranks: Per process the three memory figures above, which are the largest of them; the bytes of weights,
            gradients and optimizer state within the peak where they were measured, and the part of them on the host;
            `tracked`, bytes of live tensors at their peak by side and category.
        references: `dense` and `pruned` -> their `sparsity`, `model_sparsity` and `disk_bytes`, where measured.
        budget: What a comparison held equal by `match`: the `quantity`, its `limit`, the row that has so much (`of`),
            `planned`, what this row should need of it, and the `options` that follow; empty where nothing was.
        prediction: Predicted needs of the run, as `recon.planner.Prediction` has them, or the `reason` why there is no
            prediction; empty for what is not planned.
        windows: Name of each recovered window -> held-out error `before` and `after` of the weights that it has kept.
            One that ended worse than it began has kept its start, with the error of its end as `discarded`.
        starts: Name of each recovered window -> `exact` or `pruned`, where `model.start: auto` has chosen.
        few_rows: Name of each expert's matrix whose statistics had fewer rows than it has inputs -> rows.
        left_dense: Name of each parameter of the blocks with two dimensions or more that is never pruned, such as
            routers and kernels of convolutions -> shape; empty where nothing was pruned.
        rates: Kind of window -> the learning rate that `model.lr: auto` has chosen for it (`lr`), the `steps` of a
            trial, and `tried`, each rate with its held-out `error`, None if it diverged.
        parents: The runs whose weights it began with: `run_dir`, `label`, `seed` and `perplexity`, measured alike (None
            if it was not); of an average `share`, its part of the sum, and where that was chosen `validation`, its
            perplexity on the validation split.
        throughput: Tokens per second of all processes, model FLOP utilisation, and the tokens and seconds of their
            measurement; empty if not measured.
        tuning: The points tried to choose this cell's options: `options`, `perplexity` on the validation split (None if
            it failed), `seconds`, `chosen`, and `error` if it failed.
        drift: Distance to the dense model, as `recon.evaluation.drift.Drift` has it: `hidden`, relative squared error
            after each block, `kl`, nats per predicted token, and the text; empty if not measured.
        densities: Name of each pruned weight -> the share of it that is kept, 0 to 1.
        losses: `model`, and `dense` and `pruned` if measured -> negative log-likelihood of each sequence of the
            protocol, in its order: nats, summed over the sequence's predicted tokens.
        tasks: Name of each task -> its scores, as `recon.evaluation.tasks.suite.Suite.score` has them; empty if there
            are none.

    Raises:
        ValueError: If `scope` or `status` is unknown, a failed report lacks its reason, `seconds` is not finite, or a
            value has another type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scope: str
    model: str
    criterion: str
    pattern: str
    seed: int
    label: str = ""
    text: str = ""
    perplexity: float | None = None
    dense_perplexity: float | None = None
    pruned_perplexity: float | None = None
    sparsity: float | None = None
    model_sparsity: float | None = None
    disk_bytes: int | None = None
    mask_violations: int | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    baseline_host_bytes: int | None = None
    seconds: float = Field(default=0.0, allow_inf_nan=False)
    train_tokens: int = 0
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    run_dir: str = ""
    protocol: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    ranks: list[dict[str, Any]] = []
    references: dict[str, dict[str, Any]] = {}
    windows: dict[str, dict[str, float]] = {}
    starts: dict[str, Literal["exact", "pruned"]] = {}
    few_rows: dict[str, int] = {}
    left_dense: dict[str, list[int]] = {}
    rates: dict[str, dict[str, Any]] = {}
    parents: list[dict[str, Any]] = []
    throughput: dict[str, Any] = {}
    drift: dict[str, Any] = {}
    budget: dict[str, Any] = {}
    prediction: dict[str, Any] = {}
    tuning: list[dict[str, Any]] = []
    densities: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    tasks: dict[str, dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _label_by_scope(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("label"):
            return values | {"label": str(values.get("scope", ""))}
        return values

    @field_validator("scope")
    @classmethod
    def _one_of_the_scopes(cls, scope: str) -> str:
        if scope not in SCOPES:
            raise ValueError(f"must be one of {', '.join(SCOPES)}")
        return scope

    @field_validator("perplexity", "dense_perplexity", "pruned_perplexity", "sparsity", "model_sparsity")
    @classmethod
    def _none_if_not_finite(cls, value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    @model_validator(mode="after")
    def _as_tables_read_it(self) -> "Report":
        for name, form in PARTS.items():
            try:
                form.validate_python(getattr(self, name))
            except ValidationError as error:
                raise ValueError(f"`{name}` is not as recon writes it: {first_fault(error)}") from None
        return self

    @model_validator(mode="after")
    def _says_why_it_failed(self) -> "Report":
        if self.status == "failed" and not self.error:
            raise ValueError(f"a failed report must say why; got no `error` for scope {self.scope!r}")
        return self

    @computed_field
    @property
    def recovered(self) -> float | None:
        """Share of the perplexity gap that is closed: 1 is dense, 0 pruned, below 0 worse than pruned.

        (pruned - x) / (pruned - dense), x being `perplexity`; the dense and the pruned cell are their own references.
        None if one of the three is missing, or if pruning opened no gap.
        """
        dense = self.perplexity if self.scope == "dense" else self.dense_perplexity
        pruned = self.perplexity if self.scope == "pruned" else self.pruned_perplexity
        if self.perplexity is None or dense is None or pruned is None or pruned == dense:
            return None
        return (pruned - self.perplexity) / (pruned - dense)

    @computed_field
    @property
    def task_mean(self) -> dict[str, float | None] | None:
        """The mean over tasks of their main metrics: `value`, `stderr` and `delta`, the distance to the dense model's.

        None without tasks, or if a task has no value; a delta of None if the dense model was not asked the same tasks.
        """
        return mean_of(self.tasks, self._tasks_of_dense)

    @computed_field
    @property
    def task_deltas(self) -> dict[str, float]:
        """Each task -> its main metric minus the dense model's, where both are known."""
        return deltas(self.tasks, self._tasks_of_dense)

    @computed_field
    @property
    def flops(self) -> int | None:
        """Operations of the recovery, all processes together, as the plan has counted them; None if nothing has."""
        return self.prediction.get("flops")

    @computed_field
    @property
    def device_seconds(self) -> float:
        """Seconds times processes."""
        return self.seconds * self.environment.get("processes", 1)

    @property
    def budget_share(self) -> float | None:
        """Part of a comparison's budget that the row should need; None where nothing was held equal."""
        return self.budget["planned"] / self.budget["limit"] if self.budget else None

    @property
    def _tasks_of_dense(self) -> dict[str, Any]:
        return self.tasks if self.scope == "dense" else self.references.get("dense", {}).get("tasks", {})

    @property
    def peaks(self) -> dict[str, int | None]:
        """Peak bytes on the `host` (resident memory, libraries included) and the `device`; None if unmeasured."""
        return {"host": self.peak_host_bytes, "device": self.peak_device_bytes}

    @property
    def tracked_device_bytes(self) -> int | None:
        """The most bytes of live tensors on the device during recovery, of the largest process; None if unmeasured.

        Without an accelerator: of the tensors that would be on one.
        """
        sides = [rank.get("tracked", {}).get("device") for rank in self.ranks]
        return max((sum(sizes.values()) for sizes in sides if sizes), default=None)

    @property
    def initial_perplexity(self) -> float | None:
        """Perplexity of the run that it started from; None if it started from none or several."""
        return self.parents[0]["perplexity"] if len(self.parents) == 1 else None

    @property
    def reset_windows(self) -> list[str]:
        """The windows that ended worse than they began, and have kept their start."""
        return [name for name, errors in self.windows.items() if "discarded" in errors]

    def replace(self, **changes: Any) -> "Report":
        """A copy with some fields changed, validated as a new one."""
        return Report(**(dict(self) | changes))

    def to_dict(self) -> dict[str, Any]:
        """All fields and what is computed of them, ready for strict JSON: numbers that are not finite are None."""
        return json.loads(self.model_dump_json())

    @classmethod
    def from_dict(cls, payload: dict[str, Any], source: str = "the report") -> "Report":
        """The report that `to_dict` wrote; what is computed of its fields is computed anew.

        Args:
            payload: Names and values; the fields that have a default may be missing.
            source: Name of the payload in error messages, e.g. the file it was read from.

        Raises:
            ValueError: If a name is unknown, a required one missing, or a value of another type.
        """
        return validated(cls, _without_computed(payload), source)

    def save(self, path: Path | str, writing: Writer = atomic_write) -> None:
        """Write the report to `path`, atomically.

        Args:
            path: The file.
            writing: Opens the file; `Manifest.writing` records it, too.
        """
        write_json(path, self.to_dict(), writing)

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Read the report of one run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file does not hold a report.
        """
        return cls.from_dict(read_strict(Path(path)), source=str(path))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Results:
    """The reports of one comparison.

    Args:
        cells: One report per run, failed ones included; a list that may grow.
        name: Name of the comparison.
        created: Date, ISO 8601.
        differences: Of each two recoveries, over seeds, as `recon.report.paired.differences` has them.
    """

    cells: list[Report]
    name: str = ""
    created: str = Field(default_factory=_now)
    differences: list[dict[str, Any]] = Field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Name, date, `differences` and `cells`, ready for strict JSON."""
        known = {"name": self.name, "created": self.created, "differences": self.differences}
        return known | {"cells": [cell.to_dict() for cell in self.cells]}

    def save(self, path: Path | str, writing: Writer = atomic_write) -> None:
        """As `Report.save`."""
        write_json(path, self.to_dict(), writing)

    @classmethod
    def load(cls, path: Path | str) -> "Results":
        """Read a comparison's results.json, or a single run's report.json as results of one cell.

        Args:
            path: The file, or the directory that holds it.

        Raises:
            FileNotFoundError: If there is neither.
            ValueError: If the file holds neither results nor a report.
        """
        file = find_results(Path(path))
        payload = read_strict(file)
        if "cells" not in payload:
            return cls([Report.from_dict(payload, source=str(file))], name=file.parent.name)
        if isinstance(payload["cells"], list):
            payload["cells"] = [_without_computed(cell) for cell in payload["cells"]]
        return validated(cls, {"created": ""} | payload, str(file))


def _without_computed(payload: Any) -> Any:
    if not isinstance(payload, dict):
        return payload
    return {name: value for name, value in payload.items() if name not in Report.model_computed_fields}
