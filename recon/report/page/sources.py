"""The files that a page's numbers come from, and what they say of a run beside its report."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recon.basics.manifest import Manifest
from recon.basics.run_paths import RunPaths
from recon.report.page.curves import Curve, read_curves
from recon.report.parts import load_memory
from recon.report.schema import Report

REFERENCE = "the report.json of a run that was compared with it"
"""Where the numbers of a model without a directory of its own come from."""


@dataclass(frozen=True)
class Source:
    """The directory of a cell, as far as it is there.

    Args:
        cell: The report.
        paths: Its directory; None if it is not found.
        link: The directory, relative to the page.
    """

    cell: Report
    paths: RunPaths | None
    link: str

    @classmethod
    def of(cls, cell: Report, page: Path) -> "Source":
        """Find the directory of a cell: where its report says, or beside the page if all were moved together."""
        named = Path(cell.run_dir) if cell.run_dir else None
        near = page.parent.resolve()
        for path in [named, near / named.name, near] if named else []:
            if RunPaths(path).report.is_file() or RunPaths(path).config.is_file():
                return cls(cell, RunPaths(path), os.path.relpath(path.resolve(), near))
        return cls(cell, None, "")

    @property
    def report(self) -> str:
        """The file of the report, as a title names it."""
        return f"{self.cell.run_dir}/report.json" if self.cell.run_dir else REFERENCE

    @property
    def config(self) -> str:
        """The resolved options; empty if they are not there."""
        return self._read(self.paths.config) if self.paths else ""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Digest of the run's identity, and the versions that it names; empty if it is not there."""
        if self.paths is None or not (text := self._read(self.paths.fingerprint_file)):
            return {}
        manifest = Manifest(self.paths.path).read()
        return {"sha256": (manifest and manifest.identity) or "", "versions": json.loads(text).get("versions", {})}

    @property
    def memory(self) -> dict[str, Any]:
        """The phases of the run; empty if they were not measured."""
        file = self.paths.memory() if self.paths else None
        return load_memory(file) if file is not None and file.is_file() else {}

    @property
    def curves(self) -> dict[str, Curve]:
        """What its loggers wrote."""
        return read_curves(self.paths.logs) if self.paths is not None and self.paths.logs.is_dir() else {}

    @staticmethod
    def _read(file: Path) -> str:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
