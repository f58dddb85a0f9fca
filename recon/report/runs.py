"""Any set of runs as one set of results: reports are found, references added, labels told apart."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recon.report.schema import Report, Results

NOT_OF_REFERENCES: dict[str, Any] = {
    "mask_violations": None,
    "peak_host_bytes": None,
    "peak_device_bytes": None,
    "baseline_host_bytes": None,
    "seconds": 0.0,
    "train_tokens": 0,
    "ranks": [],
    "references": {},
    "windows": {},
    "parents": [],
    "throughput": {},
    "drift": {},
    "losses": {},
    "densities": {},
    "tasks": {},
    "prediction": {},
    "tuning": [],
    "model_sparsity": None,
    "disk_bytes": None,
    "sparsity": None,
}
"""Fields of a run that say nothing of the models it is compared with."""


def with_references(report: Report) -> list[Report]:
    """The dense and the pruned model that a run was compared with, as far as it measured them, and the run itself."""
    rows = []
    known = {"pruned_perplexity": report.perplexity} if report.scope == "pruned" else {}
    for scope in ("dense", "pruned"):
        perplexity = getattr(report, f"{scope}_perplexity")
        if perplexity is not None and report.scope not in (scope, "dense"):
            dense = {"dense": report.references["dense"]} if "dense" in report.references else {}
            compared = {"references": dense} if scope == "pruned" else {}
            measured = NOT_OF_REFERENCES | known | compared | report.references.get(scope, {})
            if scope in report.losses:
                measured |= {"losses": {"model": report.losses[scope]}}
            rows.append(report.replace(scope=scope, label=scope, perplexity=perplexity, run_dir="", **measured))
    return [*rows, report]


def collect(paths: Sequence[Path | str]) -> Results:
    """The results of run directories, comparison directories, results.json and report.json files together.

    A dense or pruned model that several runs were compared with is listed once. The names of directories tell runs of
    the same label and seed apart.

    Args:
        paths: What to read; one named twice is read once.

    Raises:
        FileNotFoundError: If there is neither results nor report at a path.
        ValueError: If a file holds something else.
    """
    distinct = list({Path(path).resolve(): Path(path) for path in paths}.values())
    loaded = [Results.load(path) for path in distinct]
    places = _short_names([path if path.is_dir() else path.parent for path in distinct])
    own = [(cell, place) for results, place in zip(loaded, places, strict=True) for cell in results.cells]
    if len(loaded) > 1:
        own = _references_once(own)
    cells = _told_apart(own)
    references = [one for cell in cells if cell.status == "ok" for one in with_references(cell)[:-1]]
    created = loaded[0].created if len(loaded) == 1 else ""
    return Results([*_new(references, cells), *cells], ", ".join(results.name for results in loaded), created)


def _references_once(cells: list[tuple[Report, str]]) -> list[tuple[Report, str]]:
    known, once = [], []
    for cell, place in cells:
        if cell.scope in ("dense", "pruned") and cell.status == "ok":
            if _identity(cell) in known:
                continue
            known.append(_identity(cell))
        once.append((cell, place))
    return once


def _told_apart(cells: list[tuple[Report, str]]) -> list[Report]:
    twins = Counter(_row(cell) for cell, _ in cells)
    return [cell.replace(label=f"{cell.label} ({place})") if twins[_row(cell)] > 1 else cell for cell, place in cells]


def _row(cell: Report) -> tuple[Any, ...]:
    return cell.model, cell.text, cell.criterion, cell.pattern, cell.scope, cell.label, cell.seed


def _new(references: Iterable[Report], cells: Iterable[Report]) -> list[Report]:
    """The references that are not among `cells`, each once."""
    known = [_identity(cell) for cell in cells]
    new = []
    for reference in references:
        if (identity := _identity(reference)) not in known:
            known.append(identity)
            new.append(reference)
    return new


def _identity(cell: Report) -> tuple[Any, ...]:
    """What makes two rows the same model measured alike; the dense one does not depend on pruning."""
    of_pruning = () if cell.scope == "dense" else (cell.text, cell.criterion, cell.pattern, cell.seed)
    return cell.model, cell.scope, *of_pruning, cell.perplexity, cell.protocol


def _short_names(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for number in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-number:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]
