"""Sparse model soups: the mean of several recoveries under one mask (arXiv 2203.05482, 2306.16788).

A weight that every model has as zero is zero in the mean, so masks are exact by construction. Weights are read and
written one tensor at a time.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from recon.basics.manifest import FOR_PEOPLE
from recon.data import TokenData
from recon.evaluation.perplexity import Evaluation
from recon.experiment.carding import write_card
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import environment
from recon.experiment.opened import Opener
from recon.experiment.origin import Origin
from recon.experiment.sizes import written_sizes
from recon.experiment.verification import violations_of_model
from recon.models.loading import ModelSource
from recon.models.weight_files import weight_places
from recon.profiling.process_memory import PeakMeter, resident_bytes
from recon.pruning.masks import Masks, identity_of
from recon.pruning.prune import metadata_at
from recon.pruning.start_weights import DTYPES, written
from recon.report import Report

log = logging.getLogger("recon")

NAME = "recon soup"

MeasuredSplit = Literal["test", "validation"]
"""The splits that perplexity is measured on."""

Weights = Literal["uniform", "greedy"]
"""`uniform` averages all runs; `greedy` takes the best on the validation split, then each that makes it no worse."""


def require_alike(origins: Sequence[Origin]) -> None:
    """Refuse runs that cannot be averaged.

    Raises:
        ValueError: If there are fewer than two, one is not whole or there twice, or masks or dense models differ.
    """
    if len(origins) < 2:
        raise ValueError(f"{NAME} needs at least two runs, got {len(origins)}; name more")
    for origin in origins:
        origin.require()
    first, masks = origins[0], identity_of(origins[0].run.masks)
    weights: dict[str, Path] = {}
    for origin in origins:
        origin.require_same_model(first.dense())
        if identity_of(origin.run.masks) != masks:
            raise ValueError(
                f"{NAME} averages recoveries under the same masks, got {origin.path} with others than {first.path}; "
                f"recover both from one mask: --masks {first.run.masks}, or --from one run"
            )
        if (twin := weights.setdefault(str(origin.identity()["weights"]), origin.path)) is not origin.path:
            raise ValueError(f"{NAME} needs different models, got the same weights in {twin} and {origin.path}")


def average(models: Sequence[Path], target: Path) -> None:
    """Write the mean of models, tensor by tensor, with the other files of the first.

    Sums are in fp32 (fp64 of fp64 weights) in the order given; the mean is rounded to the dtype of the first model.

    Args:
        models: Directories in Hugging Face format.
        target: The directory to fill.

    Raises:
        ValueError: If names, shapes or kinds of weights differ.
    """
    places = [weight_places(model, NAME) for model in models]
    for model, one in zip(models, places, strict=True):
        if different := sorted(one.keys() ^ places[0].keys()):
            raise ValueError(
                f"{NAME} needs models with the same weights, got {different[0]} in {model} or {models[0]} alone"
            )
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(set(places[0].values())):
        names = sorted(name for name, path in places[0].items() if path == file)
        like = {name: _like(file, name) for name in names}
        with written(target / file.name, like, metadata={"format": "pt"}) as write:
            for name in names:
                write(name, _mean([one[name] for one in places], name, like[name]))
    for other in sorted(models[0].iterdir()):
        if other.is_file() and other.suffix not in (".safetensors", *FOR_PEOPLE):
            shutil.copyfile(other, target / other.name)


def _like(file: Path, name: str) -> Tensor:
    """A tensor without data, of the shape and dtype of a stored one."""
    by_name = {known: dtype for dtype, known in DTYPES.items()}
    with safe_open(file, framework="pt") as opened:
        stored = opened.get_slice(name)
        if stored.get_dtype() not in by_name:
            raise ValueError(f"{NAME} averages {', '.join(by_name)}, got {stored.get_dtype()} for {name} in {file}")
        return torch.empty(stored.get_shape(), dtype=by_name[stored.get_dtype()], device="meta")


def _mean(files: Sequence[Path], name: str, like: Tensor) -> Tensor:
    """The mean of a stored weight; by differences to the first, so that equal weights stay as they are."""
    dtype, first, total = torch.promote_types(like.dtype, torch.float32), None, torch.zeros(())
    for file in files:
        with safe_open(file, framework="pt") as opened:
            weight = opened.get_tensor(name)
        if weight.shape != like.shape:
            raise ValueError(
                f"{NAME} needs weights of one shape, got {list(weight.shape)} for {name} in {file}, {list(like.shape)} "
                f"in {files[0]}"
            )
        first = weight.to(dtype) if first is None else first
        total = total + (weight.to(dtype) - first)
    assert first is not None
    return first + total / len(files)


class PerplexityMeter:
    """Measures models on one split after the other, one model in memory at a time.

    Args:
        source: The dense model, in whose precision all is computed.
        data: The tokens.
        opened: Opens a model on the device.
    """

    def __init__(self, source: ModelSource, data: TokenData, opened: Opener) -> None:
        self.source, self.data, self._opened = source, data, opened

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._opened.device

    def measure(self, directory: Path, split: MeasuredSplit) -> Evaluation:
        """Perplexity of a model on a split."""
        model = self._opened(self.source.at(directory))
        if self.data.tokenizer is None:
            self.data.tokenizer = self.source.at(directory).tokenizer_for(model.model)
        self.data.require([split], model.model)
        self.data.evaluate_on = split
        return model.evaluate(self.data)


def chosen(models: Sequence[Path], perplexity_of: Callable[[Path], float], work: Path) -> tuple[list[int], list[float]]:
    """Choose the models of a greedy soup on the validation split.

    Args:
        models: Directories of the models.
        perplexity_of: Measures one on the validation split.
        work: A directory for the mean of those chosen so far; deleted.

    Returns:
        Indices of the chosen models in ascending order, and the perplexity of each model by itself.
    """
    alone = [perplexity_of(model) for model in models]
    order = sorted(range(len(models)), key=alone.__getitem__)
    taken, best = [order[0]], alone[order[0]]
    for index in order[1:]:
        tried = sorted([*taken, index])
        shutil.rmtree(work, ignore_errors=True)
        try:
            average([models[one] for one in tried], work)
            perplexity = perplexity_of(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        log.info(f"validation perplexity {perplexity:.3f} with {models[index].parent}, {best:.3f} without")
        if perplexity <= best:
            taken, best = tried, perplexity
    return taken, alone


def soup(
    origins: Sequence[Origin],
    weights: Weights,
    meter: PerplexityMeter,
    run: RunDirectory,
    split: MeasuredSplit,
) -> Report:
    """Average runs, write the model with its masks, measure it; a finished soup is only read.

    Args:
        origins: The runs, which `require_alike` has accepted.
        weights: Which of them to average.
        meter: Measures models.
        run: Where everything goes.
        split: The split that the mean is measured on.

    Returns:
        The report. Its seconds, tokens and peak memory are those of the recoveries and of averaging together.
    """
    if run.is_finished:
        log.info(f"{run.path} holds this soup, finished: nothing to do")
        write_card(run)
        return Report.load(run.report)
    run.drop_report()
    baseline, peaks, started = resident_bytes(), PeakMeter(), time.monotonic()
    peaks.start()
    models = [origin.run.model for origin in origins]
    taken, alone = list(range(len(models))), []
    if weights == "greedy":
        work = run.path / "candidate"
        taken, alone = chosen(models, lambda model: meter.measure(model, "validation").perplexity, work)
    masks, made_by = Masks.load(origins[0].run.masks), metadata_at(origins[0].run.masks)
    masks.save(run.masks, made_by, run.manifest.writing)
    log.info(f"average {len(taken)} of {len(models)} models")
    with run.manifest.placing(run.model) as made:
        average([models[index] for index in taken], made)
    seconds, peak = time.monotonic() - started, peaks.stop()
    evaluation, held = meter.measure(run.model, split), [origin.report() for origin in origins]
    protocol = evaluation.protocol | meter.data.carving(split)
    alike = next((one for one in held if one.protocol == protocol and one.dense_perplexity is not None), None)
    report = Report(
        scope=held[0].scope,
        label=_label(held, len(taken), weights),
        model=meter.source.name,
        criterion=held[0].criterion,
        pattern=held[0].pattern,
        seed=held[0].seed,
        perplexity=evaluation.perplexity,
        dense_perplexity=alike and alike.dense_perplexity,
        pruned_perplexity=alike and alike.pruned_perplexity,
        references=alike.references if alike else {},
        sparsity=masks.sparsity,
        mask_violations=violations_of_model(masks, run.model),
        **written_sizes(run.model),
        seconds=seconds + sum(one.seconds for one in held),
        train_tokens=sum(one.train_tokens for one in held),
        protocol=protocol,
        run_dir=str(run.path),
        environment=environment(meter.device),
        parents=_parents(origins, held, protocol, taken, alone),
        peak_host_bytes=_largest(peak.host_bytes, *(one.peak_host_bytes for one in held)),
        peak_device_bytes=_largest(peak.device_allocated_bytes, *(one.peak_device_bytes for one in held)),
        baseline_host_bytes=baseline,
    )
    report.save(run.report, run.manifest.writing)
    write_card(run, masks)
    return report


def _largest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _label(held: Sequence[Report], num_taken: int, weights: Weights) -> str:
    labels = {one.label for one in held}
    number = f"{num_taken} of {len(held)}" if weights == "greedy" else f"{len(held)}"
    return f"soup of {number} {labels.pop()}" if len(labels) == 1 else f"soup of {number}"


def _parents(
    origins: Sequence[Origin],
    held: Sequence[Report],
    protocol: Mapping[str, Any],
    taken: Sequence[int],
    alone: Sequence[float],
) -> list[dict[str, Any]]:
    found = []
    for index, (origin, report) in enumerate(zip(origins, held, strict=True)):
        known = origin.as_parent(report.perplexity if report.protocol == protocol else None)
        known["share"] = 1 / len(taken) if index in taken else 0.0
        found.append(known | ({"validation": alone[index]} if alone else {}))
    return found
