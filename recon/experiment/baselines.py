"""The rows that no scope makes: a model as it is, dense or sparse, and the pruned one before recovery."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from recon.data import TokenData
from recon.evaluation.drift import measure_drift
from recon.evaluation.perplexity import evaluate
from recon.experiment.directory import RunDirectory, save_model
from recon.experiment.environment import environment
from recon.experiment.sizes import source_size, sparsities, written_sizes
from recon.models.linear import is_matrix, weight_out_in
from recon.models.loading import ModelSource
from recon.models.stored import share_of_zeros
from recon.profiling.process_memory import PeakMeter, resident_bytes
from recon.pruning.criteria import Criterion
from recon.pruning.masks import Masks
from recon.pruning.patterns import Pattern
from recon.pruning.prune import Pruning, moved_with, prune_to
from recon.pruning.start_weights import apply
from recon.report import Report

LEAST_SPARSITY = 1e-3
"""Share of zeros from which a model is called sparse: a few weights are zero by chance, above all in 16 bits."""


def measure(
    source: ModelSource,
    data: TokenData,
    device: torch.device,
    masks: Masks | None = None,
    promised: Masks | None = None,
    moved: Mapping[str, torch.Tensor] | None = None,
) -> Report:
    """Perplexity of a model as it is, or under masks, and the peak memory of measuring it.

    The report calls the model pruned if masks are given, sparse if there are zeros in its linear maps, dense otherwise.

    Args:
        source: The model.
        data: Test tokens.
        device: Where to compute.
        masks: Applied first, if given.
        promised: Masks that the model should keep as it is; the report counts their violations.
        moved: The weights that survive `masks`, where a criterion has moved them.

    Raises:
        ValueError: If the masks belong to another model.
    """
    baseline, meter = resident_bytes(), PeakMeter()
    meter.start()
    model, data.tokenizer = source.load(device)
    if masks is not None:
        masks.validate_for(model)
        apply(model, masks, moved)
    evaluation = evaluate(model, data.test_dataloader())
    peaks = meter.stop()
    kept = masks if masks is not None else promised
    zeros = share_of_zeros(matrices(model))
    return Report(
        scope="pruned" if masks is not None else "sparse" if zeros >= LEAST_SPARSITY else "dense",
        model=source.name,
        criterion="none" if masks is None else "given masks",
        pattern="none" if masks is None else "given masks",
        seed=data.seed,
        perplexity=evaluation.perplexity,
        sparsity=zeros if masks is None else masks.sparsity,
        model_sparsity=share_of_zeros(model.parameters()),
        **(source_size(source) if masks is None else {}),
        mask_violations=0 if kept is None else kept.violations(model),
        peak_host_bytes=peaks.host_bytes,
        peak_device_bytes=peaks.device_allocated_bytes,
        baseline_host_bytes=baseline,
        protocol=evaluation.protocol,
        environment=environment(device),
    )


def matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights of all linear maps but the head, in any model, recovered by recon or not."""
    head = model.get_output_embeddings()
    return [weight_out_in(module) for module in model.modules() if is_matrix(module) and module is not head]


def measure_pruned(
    source: ModelSource,
    data: TokenData,
    criterion: Criterion,
    pattern: Pattern,
    pruning: Pruning | None,
    run: RunDirectory,
    device: torch.device,
    keep_model: bool = False,
    drift: bool = True,
    say: Callable[[str], None] = print,
    baselines: bool = True,
) -> Report:
    """Prune a model, write its masks, and measure the pruned model; a finished run is only read.

    The pruned model of a criterion that moves weights has the moved ones, which are written beside the masks.

    Args:
        source: The model.
        data: Calibration and test tokens.
        criterion: How much a weight matters.
        pattern: Which zeros are allowed.
        pruning: How the model is walked.
        run: Where masks and report go.
        device: Where to compute.
        keep_model: Write the pruned model too.
        drift: Measure how far the pruned model is from the dense one, which is loaded again beside it.
        say: Is told what is going on, in lines.
        baselines: Measure the dense model's perplexity too.

    Returns:
        The report; its seconds and peaks are those of pruning.
    """
    if run.report.exists():
        say(f"{run.path} holds this run, finished: nothing to do")
        return Report.load(run.report)
    baseline, meter = resident_bytes(), PeakMeter()
    meter.start()
    say(f"load {source.name}")
    model, data.tokenizer = source.load(device)
    tokens = data.tokens("train")
    started = time.monotonic()
    masks = prune_to(run.masks, model, tokens, criterion, pattern, pruning, say)
    seconds = time.monotonic() - started
    peaks = meter.stop()
    apply(model, masks, moved_with(run.masks, masks))
    sizes: dict[str, Any] = {"model_sparsity": share_of_zeros(model.parameters())}
    if keep_model:
        save_model(model.to(source.stored_dtype()), data.tokenizer, run.model)  # pyright: ignore[reportArgumentType]
        sizes = written_sizes(run.model)
        # Measured as written, and computed as the dense model is.
        model = replace(source, name=str(run.model), shape=None, revision=None).model(device)
    evaluation = evaluate(model, data.test_dataloader())
    report = Report(
        scope="pruned",
        model=source.name,
        criterion=str(criterion),
        pattern=(pruning or Pruning()).describe(pattern),
        seed=data.seed,
        perplexity=evaluation.perplexity,
        **sizes,
        sparsity=masks.sparsity,
        mask_violations=masks.violations(model),
        peak_host_bytes=peaks.host_bytes,
        peak_device_bytes=peaks.device_allocated_bytes,
        baseline_host_bytes=baseline,
        seconds=seconds,
        run_dir=str(run.path),
        protocol=evaluation.protocol,
        environment=environment(device),
        **(_compared(source, model, masks, data, device, baselines, drift) if baselines or drift else {}),
    )
    report.save(run.report)
    return report


def _compared(
    source: ModelSource,
    model: PreTrainedModel,
    masks: Masks,
    data: TokenData,
    device: torch.device,
    baselines: bool,
    drift: bool,
) -> dict[str, Any]:
    """The fields of a report that compare a pruned model with the dense one, which is loaded for that."""
    fields: dict[str, Any] = {}
    dense = source.model(device)
    if baselines:
        fields["dense_perplexity"] = evaluate(dense, data.test_dataloader()).perplexity
        fields["references"] = {"dense": sparsities(dense.named_parameters(), masks) | source_size(source)}
    if drift:
        fields["drift"] = asdict(measure_drift(dense, model, data.val_dataloader()))
    return fields
