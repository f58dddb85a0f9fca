"""The directory of a run: its identity, its products, and the clean-up after a finished run."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from recon.basics.digests import digest
from recon.basics.files import partial, read_json, settle, sweep, write_json
from recon.basics.manifest import Content
from recon.basics.run_paths import RunPaths
from recon.distributed.part import Share

log = logging.getLogger("recon")

DELETE_FILE = "delete it: its measurements alone are lost"
"""Cure for a damaged file of measurements."""


class RunDirectory(RunPaths):
    """The products of a run, and the check that the directory holds this run and no other.

    Args:
        path: The directory; made if it is missing.
        fingerprint: Model, data, masks, options, versions and seed: what makes two runs comparable. None on
            ranks other than 0, which leave this check to it.

    Raises:
        ValueError: If the directory holds a run with another fingerprint, or products without a manifest.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any] | None) -> None:
        super().__init__(path)
        if fingerprint is not None:
            self._begin(json.loads(json.dumps(fingerprint, default=str)))

    def _begin(self, ours: dict[str, Any]) -> None:
        """Make the directory this run's, or go on with it; several jobs may do so at a time."""
        with self.manifest.lock():
            held = self.manifest.read()
            if held is None or held.identity != digest(ours):
                if any(product.exists() for product in self.claims):
                    raise ValueError(self._not_ours(held, ours))
                self.manifest.begin(digest(ours))
        if self.manifest.fault(self.fingerprint_file):
            write_json(self.fingerprint_file, ours, self.manifest.writing)

    def _not_ours(self, held: Content | None, ours: dict[str, Any]) -> str:
        needs = f"run_dir needs a new directory or one of this very run, got {self.path}"
        cure = "name another run_dir or delete this one"
        if different := _differences(read_json(self.fingerprint_file, dict, "run_dir", cure), ours):
            return f"{needs}, whose run differs in {', '.join(different)}; {cure}"
        is_missing = "is missing" if held is None else "is that of another run"
        return f"{needs}, whose {self.manifest.file.name} {is_missing}, so nothing is known of what lies there; {cure}"

    @property
    def has_begun(self) -> bool:
        """Whether an earlier start left parts of a recovery."""
        return self.windows.exists() or self.checkpoints.exists()

    @property
    def has_masks(self) -> bool:
        """Whether the masks are there as they were written, and the moved weights if they came with them."""
        moved = self.manifest.records(self.moved)
        return self.manifest.is_intact(self.masks) and not (moved and not self._is_whole(self.moved))

    def _is_whole(self, product: Path) -> bool:
        if fault := self.manifest.fault(product):
            log.warning(f"{fault}; it is made again")
        return fault is None

    @property
    def damage(self) -> str | None:
        """What is wrong with a product of a finished run; None if nothing is."""
        written = [path for path in (self.masks, self.moved, self.model) if self.manifest.records(path)]
        found = (self.manifest.fault(path) for path in (self.report, *written))
        return next((fault for fault in found if fault is not None), None)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended, with its products as they were written."""
        return self.report.exists() and self.damage is None

    def reopen(self, has_windows: bool) -> None:
        """Make a finished run with a damaged product one that goes on, to make the product again from its windows.

        Args:
            has_windows: Whether the run is one that leaves windows.

        Raises:
            ValueError: If the windows are not all as they were written, naming the damaged product.
        """
        if not self.report.exists() or (damage := self.damage) is None:
            return
        windows = self.manifest.fault(self.windows) if has_windows else None
        if not has_windows or windows is not None:
            also = f"; {windows}" if windows else ""
            raise ValueError(
                f"a finished run needs its products as they were written, got {damage}{also}; copy it again, or delete "
                f"{self.report} to recover the model again"
            )
        log.warning(f"{damage}; it is made again from the windows")

    def drop_report(self) -> None:
        """Take back that the run has ended."""
        self.manifest.forget(self.report)
        self.report.unlink(missing_ok=True)

    def part(self, share: Share) -> Path:
        """The directory for the measurements of the job that recovers a share of the windows."""
        return self.parts / f"{share.index + 1:03d}-of-{share.of:03d}"

    def measurements(self, share: Share | None = None) -> RunPaths:
        """Where a process measures its memory: here, or in the directory of its share."""
        return self if share is None else RunPaths(self.part(share))

    def peaks(self, rank: int = 0, share: Share | None = None) -> dict[str, Any] | None:
        """The measurements of MemoryProfiler on a rank, or in the job of a share; None without."""
        file = self.measurements(share).memory(rank)
        return read_json(file, dict, "a report", DELETE_FILE) if file.exists() else None

    def write_part(self, share: Share, measured: dict[str, Any]) -> None:
        """Note the measurements of the job of a share."""
        write_json(self.part(share) / "part.json", measured, self.manifest.writing)

    def read_parts(self) -> list[dict[str, Any]]:
        """The measurements of the jobs, in the order of shares; empty if none was divided.

        Raises:
            ValueError: If one of them is damaged, or of another version.
        """
        files = sorted(self.parts.glob("*/part.json"))
        for file in files:
            self.manifest.require(file, f"copy it again, or {DELETE_FILE}")
        parts = [read_json(file, dict, "merge", DELETE_FILE) for file in files]
        for file, part in zip(files, parts, strict=True):
            if missing := [name for name in ("seconds", "at_least", "resumed", "peaks") if name not in part]:
                raise ValueError(
                    f"merge needs measurements with {', '.join(missing)}, got {file}, made by another version of "
                    f"recon; {DELETE_FILE}, or use that version"
                )
        return parts

    def sweep(self) -> None:
        """Delete what processes that were killed have left; only the owner of the directory may do so."""
        places = self.path, self.text, self.block_masks, self.windows, self.checkpoints, self.model
        for place in (*places, *self.parts.glob("*")):
            sweep(place)
        settle(self.model)
        for product in (self.model, self.dense):
            shutil.rmtree(partial(product), ignore_errors=True)
        if self.is_finished:
            self.clean()

    def clean(self) -> None:
        """Delete what a finished run has no more use for."""
        self.manifest.forget(*self.temporary)
        for product in self.temporary:
            if product.is_dir():
                shutil.rmtree(product, ignore_errors=True)
            else:
                product.unlink(missing_ok=True)


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two nested dicts."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix.removesuffix(".")]
    keys = sorted(ours.keys() | theirs.keys())
    return [name for key in keys for name in _differences(ours.get(key), theirs.get(key), f"{prefix}{key}.")]
