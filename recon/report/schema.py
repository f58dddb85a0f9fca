"""`Report`, what one run measured, and `Results`, the reports of one comparison; dataclass <-> JSON.

The JSON is strict: it holds no NaN or Infinity. A number that is not finite is written as null, and a
perplexity that is not finite (a diverged recovery) counts as not measured: it is None in memory too, so
that what is shown right after a run and what is shown from its file agree.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, get_origin

from recon.basics.files import write_json

SCOPES = ("dense", "pruned", "matrix", "submodule", "block", "full")
"""What a report can be about, in the order of tables: two references, then the recovery scopes."""

STATUSES = ("ok", "failed")


@dataclass(kw_only=True)
class Report:
    """What one run, one cell of a comparison, measured.

    Args:
        scope: One of `SCOPES`.
        model: Name or path of the dense model.
        criterion: What chose the weights to keep. The dense cell carries its comparison's, so that it
            stands in the same table as the cells it is compared with; likewise `pattern`.
        pattern: Which zeros were allowed, e.g. "2:4".
        seed: Seed of the run.
        label: How its row is called, e.g. "block x2"; the scope if empty.
        perplexity: After the recovery; None if not measured or not finite.
        dense_perplexity: Of the model before pruning, measured alike.
        pruned_perplexity: Of the model after pruning and before recovery, measured alike.
        sparsity: Share of zeros among the prunable weights, 0 to 1; None if the run failed before.
        mask_violations: Number of pruned weights that are not zero; None if not counted.
        peak_host_bytes: Peak resident memory of the process.
        peak_device_bytes: Peak memory allocated on the accelerator; None without one.
        baseline_host_bytes: Resident memory with the libraries loaded, before the model.
        seconds: Wall time of the recovery alone, without loading, pruning and evaluation.
        train_tokens: Tokens that the recovery processed, epochs counted.
        status: "ok" or "failed".
        error: Why a failed run failed.
        run_dir: Where the run was kept.
        protocol: How perplexity was measured: split, num_sequences, seq_len, tokens_scored, ...
        environment: Where: device name, torch version, date, processes, strategy, ...
        ranks: Per process the three memory figures above, which are the largest of them, and the bytes of
            weights, gradients and optimizer state within the peak where they were measured, with how many
            of them all lie on the host; `tracked`, bytes of live tensors at their peak by side and category.
        prediction: What the run was predicted to need, as `recon.planner.Prediction` has it, or the `reason` why that
            could not be said; empty for what is not planned.
        throughput: Tokens per second of all processes, model FLOP utilisation, and over how many tokens and
            seconds they were measured; empty if they were not.
        tuning: What was tried to choose this cell's options, point by point: `options`, `perplexity` on the
            validation split (None if it failed), `seconds`, `chosen`, and `error` where it failed.
        drift: Distance to the dense model, as `recon.drift.Drift` has it: `hidden`, relative squared error after
            each block, `kl`, nats per predicted token, and on what; empty if not measured.

    Raises:
        ValueError: If `scope` or `status` is unknown, a failed report does not say why, or `seconds` is not
            finite.
    """

    scope: str
    model: str
    criterion: str
    pattern: str
    seed: int
    label: str = ""
    perplexity: float | None = None
    dense_perplexity: float | None = None
    pruned_perplexity: float | None = None
    sparsity: float | None = None
    mask_violations: int | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    baseline_host_bytes: int | None = None
    seconds: float = 0.0
    train_tokens: int = 0
    status: str = "ok"
    error: str | None = None
    run_dir: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    throughput: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"a report's scope must be one of {', '.join(SCOPES)}; got {self.scope!r}")
        if self.status not in STATUSES:
            raise ValueError(f"a report's status must be one of {', '.join(STATUSES)}; got {self.status!r}")
        if self.status == "failed" and not self.error:
            raise ValueError(f"a failed report must say why; got no `error` for scope {self.scope!r}")
        if not _is_finite(self.seconds):
            raise ValueError(f"a report's seconds must be finite; got {self.seconds} for scope {self.scope!r}")
        self.label = self.label or self.scope
        for name in ("perplexity", "dense_perplexity", "pruned_perplexity", "sparsity"):
            if not _is_finite(getattr(self, name)):
                setattr(self, name, None)

    @property
    def recovered(self) -> float | None:
        """Share of the perplexity gap that is closed: 1 is dense, 0 pruned, below 0 worse than pruned.

        (pruned - x) / (pruned - dense), x being `perplexity`; the dense and the pruned cell are their own
        references. None if one of the three is missing, or if pruning opened no gap.
        """
        dense = self.perplexity if self.scope == "dense" else self.dense_perplexity
        pruned = self.perplexity if self.scope == "pruned" else self.pruned_perplexity
        if self.perplexity is None or dense is None or pruned is None or pruned == dense:
            return None
        return (pruned - self.perplexity) / (pruned - dense)

    @property
    def peaks(self) -> dict[str, int | None]:
        """Peak bytes of recovery on the `host` and on the `device`, None without one."""
        return {"host": self.peak_host_bytes, "device": self.peak_device_bytes}

    def to_dict(self) -> dict[str, Any]:
        """All fields and `recovered`, ready for strict JSON: numbers that are not finite are None."""
        return _finite(dataclasses.asdict(self) | {"recovered": self.recovered})

    @classmethod
    def from_dict(cls, payload: dict[str, Any], source: str = "the report") -> "Report":
        """The report that `to_dict` wrote; `recovered` is computed anew.

        Args:
            payload: Names and values; the fields that have a default may be missing.
            source: What error messages call it, e.g. the file it was read from.

        Raises:
            ValueError: If a name is unknown, a required one missing, or a value of another type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(payload.keys() - fields.keys() - {"recovered"}):
            raise ValueError(
                f"{source} has the unknown fields {', '.join(unknown)}; known are {', '.join(fields)}. "
                "Read it with the version of recon that wrote it"
            )
        required = [name for name, f in fields.items() if _is_required(f)]
        if missing := [name for name in required if name not in payload]:
            raise ValueError(f"{source} lacks {', '.join(missing)}; a report needs {', '.join(required)}")
        values = {name: payload[name] for name in fields if name in payload}
        for name, value in values.items():
            values[name] = _typed(value, fields[name].type, f"`{name}` of {source}")
        return cls(**values)

    def save(self, path: Path | str) -> None:
        """Write the report to `path`, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Read the report of one run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file does not hold a report.
        """
        return cls.from_dict(_read_json(Path(path)), source=str(path))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Results:
    """The reports of one comparison.

    Args:
        cells: One report per run; failed ones are among them.
        name: Name of the comparison.
        created: When, ISO 8601.
    """

    cells: list[Report]
    name: str = ""
    created: str = field(default_factory=_now)

    def to_dict(self) -> dict[str, Any]:
        """Name, date and `cells`, ready for strict JSON."""
        return {"name": self.name, "created": self.created, "cells": [cell.to_dict() for cell in self.cells]}

    def save(self, path: Path | str) -> None:
        """Write the results to `path`, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "Results":
        """Read a comparison's results.json, or a single run's report.json as results of one cell.

        Args:
            path: The file, or the directory that holds it.

        Raises:
            FileNotFoundError: If there is neither.
            ValueError: If the file holds neither results nor a report.
        """
        file = _find(Path(path))
        payload = _read_json(file)
        if "cells" not in payload:
            return cls([Report.from_dict(payload, source=str(file))], name=file.parent.name)
        if unknown := sorted(payload.keys() - {"name", "created", "cells"}):
            raise ValueError(f"{file} has the unknown fields {', '.join(unknown)}; known are name, created, cells")
        cells = _typed(payload["cells"], list, f"`cells` of {file}")
        reports = []
        for i, cell in enumerate(cells):
            source = f"cell {i} of {file}"
            reports.append(Report.from_dict(_typed(cell, dict, source), source=source))
        return cls(reports, name=payload.get("name", ""), created=payload.get("created", ""))


def _find(path: Path) -> Path:
    candidates = [path / "results.json", path / "report.json"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"results need a results.json, or the report.json of a single run; there is no "
        f"{' and no '.join(map(str, candidates))}. Run `recon compare` first, or name its output directory"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no report at {path}; run `recon compare` first, or name its output")

    def refuse(token: str) -> NoReturn:
        raise ValueError(f"{token} is not strict JSON")

    try:
        payload = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path} must hold strict JSON as recon writes it; reading it failed: {error}") from error
    return _typed(payload, dict, str(path))


def _is_required(f: "dataclasses.Field[Any]") -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` if it is of type `kind`; an integer passes for a float, as JSON makes no difference."""
    kind = get_origin(kind) if get_origin(kind) in (dict, list) else kind
    if type(value) is int and isinstance(0.0, kind):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{where} must be of type {name}; got {value!r} of type {type(value).__name__}")
    return value


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite(value: Any) -> Any:
    """`value` with None for each float in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
