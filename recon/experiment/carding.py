"""The card of a written model, made from what its run directory holds once the run has ended.

The card is beside the run: nothing loads it, an edited one stays, and a run without one is whole.
"""

import json
import logging
import math
from collections import defaultdict

import torch

from recon.basics.run_paths import RunPaths
from recon.models.licence import licence_of
from recon.models.stored import dtype_of
from recon.pruning.masks import Masks
from recon.pruning.whole_slices import removes_slices
from recon.report import Report
from recon.report.card import Facts, card

log = logging.getLogger("recon")


def write_card(run: RunPaths, masks: Masks | None = None) -> None:
    """Write the card of a finished run's model and record it, unless there is one; a failure is a warning.

    Args:
        run: Its report is written. Nothing is done if it has no model.
        masks: Of the run, if they are in memory.
    """
    try:
        if run.card.exists() or not run.model.is_dir() or not run.manifest.records(run.model):
            return
        text = str(card(facts_of(run, masks)))
        with run.manifest.writing(run.card) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except Exception as error:  # a page for people is no reason to lose a run
        reason = " ".join(f"{error}".split()) or type(error).__name__
        log.warning(f"could not write {run.card} ({reason}); the run is whole without it, its next start tries again")


def facts_of(run: RunPaths, masks: Masks | None = None) -> Facts:
    """The content of a card.

    Args:
        run: A finished run with a model.
        masks: Of the run, if they are in memory.

    Raises:
        ValueError: If a file is damaged.
        OSError: If a file cannot be read.
    """
    if masks is None:
        masks = Masks.load(run.masks) if run.masks.is_file() else Masks({})
    report, made_with = Report.load(run.report), json.loads(run.fingerprint_file.read_text(encoding="utf-8"))
    source = made_with["options"]["model"]
    revision = source.get("init_args", source).get("revision")
    recorded = sorted(run.manifest.records(run.model).items())
    return Facts(
        report,
        made_with,
        kinds=kinds_of(masks),
        removes_experts=removes_slices(masks),
        packed_bytes=None if report.disk_bytes is None else report.disk_bytes - _saved_by_packing(run, masks),
        weights={file.name: entry.sha256 for file, entry in recorded if file.suffix == ".safetensors"},
        licence=licence_of(report.model, revision),
    )


def kinds_of(masks: Masks) -> dict[str, tuple[int, int]]:
    """Kind of matrix -> number of its weights that are pruned, and of all, over all blocks."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, shape in masks.shapes.items():
        pruned, total = counts[kind_of(name)]
        counts[kind_of(name)] = pruned + masks.subset([name]).num_pruned, total + math.prod(shape)
    return dict(counts)


def kind_of(name: str) -> str:
    """The kind of a matrix: its parameter's name behind the number of the block, further numbers as `*`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    behind = parts[numbers[0] + 1 :] if numbers else parts
    return ".".join("*" if part.isdecimal() else part for part in behind)


def _saved_by_packing(run: RunPaths, masks: Masks) -> int:
    """Bytes of the pruned weights as stored, less those of the bits that would tell their places."""
    bits = sum(-(-math.prod(shape) // 8) for shape in masks.shapes.values())
    return masks.num_pruned * (dtype_of(run.model) or torch.float32).itemsize - bits if masks else 0
