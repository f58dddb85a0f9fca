"""The check of all that a run or a comparison has written: digests, masks, patterns, metadata, versions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from recon.basics.digests import digest
from recon.basics.manifest import FOR_PEOPLE, NAME, Entry, Manifest
from recon.basics.run_paths import RunPaths
from recon.experiment.environment import versions
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.pruning.start_weights import Start
from recon.pruning.whole_slices import without_removed
from recon.report import Report

Outcome = tuple[Path, str | None]
"""An artefact that was checked, and what is wrong with it; None if nothing is."""


@dataclass
class Verification:
    """What a check has found.

    Args:
        num_checked: Artefacts that were checked.
        faults: What is wrong, each with the name of its file.
        notes: What is no damage and good to know.
    """

    num_checked: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(directory: Path) -> Verification:
    """Check a run or a comparison with all its cells. Nothing is written.

    Args:
        directory: Of the run or of the comparison.

    Raises:
        ValueError: If it is neither.
    """
    found = Verification()
    folders = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    cells = [path for path in folders if _is_run(path)]
    if not cells and not _is_run(directory):
        raise ValueError(
            f"verify needs the directory of a run or of a comparison, with a {NAME}, got {directory}, which has none"
        )
    if cells:
        _take(found, _recorded(Manifest(directory)))
    for path in cells or [directory]:
        _take(found, _run(RunPaths(path)))
        _note_versions(found, RunPaths(path))
        _note_changes(found, RunPaths(path).manifest)
    return found


def _is_run(path: Path) -> bool:
    return (path / NAME).exists() or RunPaths(path).fingerprint_file.exists()


def _take(found: Verification, outcomes: Iterator[Outcome]) -> None:
    """Count and keep what is wrong; an artefact that cannot be read is."""
    while True:
        try:
            path, fault = next(outcomes)
        except StopIteration:
            return
        except ValueError as error:  # ends these checks: the manifest itself is damaged
            found.num_checked += 1
            found.faults.append(str(error))
            return
        found.num_checked += 1
        if fault is not None:
            found.faults.append(fault if str(path) in fault else f"{path}: {fault}")


def _recorded(manifest: Manifest) -> Iterator[Outcome]:
    for file, entry in manifest.records().items():
        if file.suffix not in FOR_PEOPLE:
            yield file, manifest.fault_of(file, entry)


def _run(run: RunPaths) -> Iterator[Outcome]:
    """Check one run; a file that is damaged is not looked into."""
    content, records = run.manifest.read(), run.manifest.records()
    if content is None:
        yield run.manifest.file, f"{run.manifest.file} is missing: nothing is known of what lies beside it"
        return
    faults = dict(_recorded(run.manifest))
    yield from faults.items()
    intact = {file for file, fault in faults.items() if fault is None}
    yield from ((file, f"{file} is not recorded in {run.manifest.file}") for file in _unrecorded(run, records))
    if run.fingerprint_file in intact:
        ours = digest(_read(run.fingerprint_file)) == content.identity
        other = f"{run.manifest.file} is that of another run than {run.fingerprint_file}"
        yield run.manifest.file, None if ours else other
    if run.config in intact:
        yield run.config, _said(lambda: yaml.safe_load(run.config.read_text(encoding="utf-8")))
    masks = None
    for file in sorted(path for path in intact if path == run.masks or path.parent == run.block_masks):
        fault = _said(lambda file=file: Masks.load(file))
        yield file, fault
        masks = Masks.load(file) if fault is None and file == run.masks else masks
    if masks is not None:
        yield from _weights(run, masks, intact)
        if run.fingerprint_file in intact:
            yield run.masks, _said(lambda: _require_masks_of_parents(run, masks))
    if run.report in intact:
        yield run.report, _said(lambda: _require_report(run, masks))
    if run.window_results in intact:
        yield run.window_results, _said(lambda: _require_results(run, intact))


def _unrecorded(run: RunPaths, records: dict[Path, Entry]) -> Iterator[Path]:
    """Products that are there and not in the manifest; logs, locks and what a killed run has measured are none."""
    free = (run.manifest.file, run.begun, run.log, run.logs, run.parts, run.memory())
    for product in (path for path in run.products if path not in free):
        files = [product] if product.is_file() else sorted(product.rglob("*")) if product.is_dir() else []
        files = [file for file in files if file.is_file() and file.suffix not in FOR_PEOPLE]
        yield from (file for file in files if file not in records and not file.name.startswith("."))


def _weights(run: RunPaths, masks: Masks, intact: set[Path]) -> Iterator[Outcome]:
    """Look for pruned weights that are not zero: in models, windows, moved weights and the exact start."""
    for model in [run.model, *sorted(run.path.glob("model-step-*"))]:
        held = {file for file in run.manifest.records(model) if file.suffix not in FOR_PEOPLE}
        if held and held <= intact:
            yield model, _said(lambda model=model: _require_zero(model, violations_of_model(masks, model)))
    for file in sorted(path for path in intact if path.parent == run.windows):
        yield file, _said(lambda file=file: _require_zero(file, _violations_of_window(masks, file)))
    for file in (path for path in (run.moved, run.start) if path in intact):
        yield file, _said(lambda file=file: _require_zero(file, _violations_of_start(masks, file)))


def violations_of_model(masks: Masks, model: Path) -> int:
    """Number of pruned weights that are not zero in the files of a model; removed experts are not there."""
    masks = without_removed(masks)
    try:
        return masks.violations_in(model)
    except ValueError:  # its architecture saves weights under other names
        return masks.violations(ModelSource(str(model)).model())


def _violations_of_window(masks: Masks, file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if name in masks]  # noqa: SIM118 -- no mapping
        return sum(masks.violations_of(name, opened.get_tensor(name)) for name in names)


def _violations_of_start(masks: Masks, file: Path) -> int:
    start = Start(file, masks)
    return sum(masks.violations_of(name, start[name]) for name in start)


def _require_zero(path: Path, count: int) -> None:
    if count:
        raise ValueError(f"{path} has {count} pruned weights that are not zero")


def _require_report(run: RunPaths, masks: Masks | None) -> None:
    """Compare a report with masks and fingerprint.

    Raises:
        ValueError: Naming what differs.
    """
    report, made_with = Report.load(run.report), _read(run.fingerprint_file).get("versions", {})
    known: dict[str, tuple[Any, Any]] = {name: (report.environment.get(name), one) for name, one in made_with.items()}
    known["mask_violations"] = report.mask_violations or 0, 0
    if masks is not None:
        metadata = Masks.read_metadata(run.masks)
        known["sparsity"] = report.sparsity, masks.sparsity
        known |= {name: (getattr(report, name), metadata[name]) for name in ("criterion", "pattern")}
    different = [f"{name} {said}, not {is_so}" for name, (said, is_so) in known.items() if said != is_so]
    if different:
        raise ValueError(f"{run.report} says {'; '.join(different)}")


def _require_masks_of_parents(run: RunPaths, masks: Masks) -> None:
    """Compare masks with those of the run that recovery started from, or of the runs that were averaged.

    Raises:
        ValueError: If they differ.
    """
    made_with = _read(run.fingerprint_file)
    parents = [*([made_with["from"]] if "from" in made_with else []), *made_with.get("soup", [])]
    if any(parent["masks"] != masks.fingerprint() for parent in parents):
        raise ValueError(f"{run.masks} has other masks than the runs that this one was made from")


def _require_results(run: RunPaths, intact: set[Path]) -> None:
    """Compare the results of windows with those that were written with their weights.

    Raises:
        ValueError: Naming the window that differs.
    """
    results = _read(run.window_results)
    for file in sorted(path for path in intact if path.parent == run.windows):
        with safe_open(file, framework="pt") as opened:
            held = json.loads(opened.metadata()["result"])
        if results.get(file.stem) != held:
            raise ValueError(f"{run.window_results} has other results than {file}")


def _note_versions(found: Verification, run: RunPaths) -> None:
    """Note the versions that a run was made with, if others are installed."""
    try:
        made_with, here = _read(run.fingerprint_file)["versions"], versions()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    other = [name for name in made_with if made_with[name] != here.get(name)]
    different = [f"{name} {made_with[name]}, here {here.get(name)}" for name in other]
    note = f"made with {'; '.join(different)}"
    if different and note not in found.notes:
        found.notes.append(note)


def _note_changes(found: Verification, manifest: Manifest) -> None:
    """Note the files for people, such as a model's card, that somebody has changed or deleted."""
    try:
        records = manifest.records()
    except ValueError:  # a fault that is known already
        return
    for file, entry in ((file, entry) for file, entry in records.items() if file.suffix in FOR_PEOPLE):
        if manifest.fault_of(file, entry) is not None:
            found.notes.append(f"{file} {'was edited' if file.is_file() else 'is gone; the next start writes it'}")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _said(check: Any) -> str | None:
    """What a check says if it fails."""
    try:
        check()
    except (ValueError, OSError, KeyError, TypeError, SafetensorError, yaml.YAMLError) as error:
        return str(error) or type(error).__name__
    return None
