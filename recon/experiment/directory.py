"""The directory of a run: its identity, its products, and the clean-up after a finished run."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from recon.basics.files import partial, read_json, settle, sweep, write_json
from recon.basics.run_paths import RunPaths
from recon.distributed.part import Share

DELETE_FILE = "delete it: its measurements alone are lost"
"""Cure for a damaged file of measurements."""


def digest(content: Any) -> str:
    """Sha256 of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class RunDirectory(RunPaths):
    """The products of a run, and the check that the directory holds this run and no other.

    Args:
        path: The directory; made if it is missing.
        fingerprint: Model, data, masks, options, versions and seed: what makes two runs comparable. None on
            ranks other than 0, which leave this check to it.

    Raises:
        ValueError: If the directory holds a run with another fingerprint.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any] | None) -> None:
        super().__init__(path)
        if fingerprint is None:
            return
        ours = json.loads(json.dumps(fingerprint, default=str))
        if self.fingerprint_file.exists() and any(product.exists() for product in self.claims):
            held = read_json(self.fingerprint_file, dict, "run_dir", "name another run_dir or delete this one")
            if held != ours:
                raise ValueError(
                    f"run_dir needs a new directory or one of this very run, got {path}, whose run differs in "
                    f"{', '.join(_differences(held, ours))}; name another run_dir or delete this one"
                )
        else:
            write_json(self.fingerprint_file, ours)

    @property
    def has_begun(self) -> bool:
        """Whether an earlier start left parts of a recovery."""
        return self.windows.exists() or self.checkpoints.exists()

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
        write_json(self.part(share) / "part.json", measured)

    def read_parts(self) -> list[dict[str, Any]]:
        """The measurements of the jobs, in the order of shares; empty if none was divided."""
        files = sorted(self.parts.glob("*/part.json"))
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
        places = self.path, self.text, self.block_masks, self.windows, self.checkpoints, *self.parts.glob("*")
        for place in places:
            sweep(place)
        settle(self.model)
        for product in (self.model, self.dense):
            shutil.rmtree(partial(product), ignore_errors=True)
        if self.report.exists():
            self.clean()

    def clean(self) -> None:
        """Delete what a finished run has no more use for."""
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
