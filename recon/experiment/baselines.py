"""The rows that no scope makes: a model as it is, dense or sparse, and the pruned one before recovery."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data import TokenData
from recon.evaluation.perplexity import Evaluation
from recon.evaluation.tasks.suite import Suite
from recon.experiment.carding import write_card
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import environment, versions
from recon.experiment.opened import Opener, OpenModel
from recon.experiment.options import RunOptions
from recon.experiment.requirements import require_free
from recon.experiment.sizes import source_size, sparsities, written_sizes
from recon.experiment.tasks import require_scorable, score_tasks
from recon.experiment.writing import save_model, with_survivors
from recon.models.anatomy import Anatomy
from recon.models.author import DenseAuthor
from recon.models.loading import ModelSource
from recon.models.matrices import is_matrix, parameters_of
from recon.models.offload.opening import Offload
from recon.profiling.process_memory import PeakMeter, resident_bytes
from recon.pruning.masks import Masks
from recon.pruning.prune import moved_with, noted, prune_to
from recon.pruning.whole_slices import without_removed
from recon.report import Report

log = logging.getLogger("recon")

LEAST_SPARSITY = 1e-3
"""Share of zeros from which a model is called sparse: a few weights are zero by chance, above all in 16 bits."""


def measure(
    source: ModelSource,
    data: TokenData,
    device: torch.device,
    masks: Masks | None = None,
    promised: Masks | None = None,
    moved: Mapping[str, torch.Tensor] | None = None,
    offload: Offload = "none",
    suite: Suite | None = None,
    run: RunDirectory | None = None,
) -> Report:
    """Perplexity of a model as it is, or under masks, its scores on tasks, and the peak memory of measuring it.

    The report calls the model pruned if masks are given, sparse if there are zeros in its linear maps, dense otherwise.

    Args:
        source: The model.
        data: Test tokens.
        device: Where to compute.
        masks: Applied first, if given.
        promised: Masks that the model should keep as it is; the report counts their violations.
        moved: The weights that survive `masks`, where a criterion has moved them.
        offload: Place of the model; with `host` and `disk` it is measured block by block.
        suite: Tasks to score it on.
        run: Keeps scores on tasks for a start that follows a killed one.

    Raises:
        ValueError: If the masks belong to another model, or the tasks cannot be scored.
    """
    if suite is not None:
        require_scorable(suite, offload)
    costs = _Costs(device)
    with _opener(offload, device) as opened:
        model = opened(source)
        data.tokenizer = source.tokenizer_for(model.model)
        data.require(["test"], model.model)
        if masks is not None:
            masks.validate_for(model.model)
            model.apply(masks, moved)
        evaluation = model.evaluate(data)
        costs.stop()
        tasks = {} if suite is None else score_tasks(suite, model, data.tokenizer, "model", run)
        kept = masks if masks is not None else promised
        violations = 0 if kept is None else model.violations(kept)
        sizes = sparsities(model.parameters(), matrices(model.model))
    given, zeros = "none" if masks is None else "given masks", sizes["sparsity"]
    return costs.report(
        source,
        data,
        evaluation,
        scope="pruned" if masks is not None else "sparse" if zeros >= LEAST_SPARSITY else "dense",
        criterion=given,
        pattern=given,
        sparsity=zeros if masks is None else masks.sparsity,
        model_sparsity=sizes["model_sparsity"],
        **(source_size(source) if masks is None else {}),
        mask_violations=violations,
        tasks=tasks,
    )


def matrices(model: PreTrainedModel) -> set[str]:
    """The names of the weights of all linear maps but the head, in any model, recovered by recon or not.

    Parameters of three dimensions count, most of which are experts.
    """
    head = model.get_output_embeddings()
    weights = {
        id(module.get_parameter("weight")) for module in model.modules() if is_matrix(module) and module is not head
    }
    return {name for name, one in model.named_parameters() if id(one) in weights or one.ndim == 3}


@contextmanager
def _opener(offload: Offload, device: torch.device) -> Iterator[Opener]:
    """Opens models; the weights of one that no files hold are read from a temporary directory."""
    with TemporaryDirectory(prefix="recon-") as temporary:
        yield Opener(offload, device, dense=Path(temporary) / "dense")


def measure_pruned(
    source: ModelSource,
    data: TokenData,
    run: RunDirectory,
    options: RunOptions,
    device: torch.device,
    keep_model: bool = False,
    offload: Offload = "none",
) -> Report:
    """Prune a model, write its masks, and measure the pruned model; a finished run is only read.

    The pruned model of a criterion that moves weights has the moved ones, which are written beside the masks.

    Args:
        source: The model.
        data: Calibration and test tokens.
        run: Where masks and report go.
        options: Criterion, pattern, how the model is walked, and whether to measure the dense perplexity and the
            drift, for which the dense model is loaded again beside the pruned one.
        device: Where to compute.
        keep_model: Write the pruned model too.
        offload: Place of the models; with `host` and `disk` all is done block by block.

    Returns:
        The report; its seconds and peaks are of pruning, or of reading masks if its environment says `resumed`.

    Raises:
        ValueError: If there is no criterion, clearly no room on the disk, or no way to score the tasks.
    """
    if options.criterion is None or options.pattern is None:
        raise ValueError("recon prune needs a criterion and a pattern, got null")
    if run.is_finished:
        log.info(f"{run.path} holds this run, finished: nothing to do")
        write_card(run)  # that of a start which was killed before it had written it
        return Report.load(run.report)
    require_scorable(options.suite, offload)
    data.require_tokenizer(source.load_tokenizer)
    costs = _Costs(device)
    log.info(f"load {source.name}")
    opened = Opener(offload, device, dense=run.dense)
    model = opened(source)
    data.tokenizer = source.tokenizer_for(model.model)
    data.author = DenseAuthor(source, data.tokenizer, versions(), lambda: model.replay or model.model)
    data.require(("train", "test", "validation") if options.drift else ("train", "test"), model.model)
    require_free(run.path, _written(source, model.model, options, keep_model))
    started, resumed = time.monotonic(), run.has_masks
    masks = _masks(model, data, run, options)
    seconds = time.monotonic() - started
    costs.stop()
    model.apply(masks, moved_with(run.masks, masks))
    if keep_model:
        _write(model, source, data.tokenizer, run, masks)
        sizes = written_sizes(run.model)
        # Measured as written, and computed as the dense model is.
        model = opened(source.at(run.model))
    else:
        sizes = {"model_sparsity": sparsities(model.parameters(), masks)["model_sparsity"]}
    evaluation = model.evaluate(data)
    report = costs.report(
        source,
        data,
        evaluation,
        scope="pruned",
        resumed=resumed,
        criterion=str(options.criterion),
        pattern=options.pruning.describe(options.pattern),
        sparsity=masks.sparsity,
        mask_violations=model.violations(without_removed(masks) if keep_model else masks),
        seconds=seconds,
        densities=masks.densities,
        run_dir=str(run.path),
        tasks=score_tasks(options.suite, model, data.tokenizer, "pruned", run),
        **noted(Masks.read_metadata(run.masks)),
        **sizes,
        **_compared(source, model, masks, data, opened, options, run),
    )
    report.save(run.report, run.manifest.writing)
    write_card(run, masks)
    run.clean()  # scores on tasks, and the dense weights that were written to be read
    return report


def _write(
    model: OpenModel, source: ModelSource, tokenizer: PreTrainedTokenizerBase, run: RunDirectory, masks: Masks
) -> None:
    stored, state = with_survivors(*model.state(source.stored_dtype(), run.path), masks)
    save_model(stored, tokenizer, run.model, state, run.manifest.placing)


def _written(source: ModelSource, model: PreTrainedModel, options: RunOptions, keep_model: bool) -> dict[str, int]:
    """What pruning writes -> its bytes."""
    prunable = Anatomy.of(model).prunable(options.pruning.exclude)
    pruned = parameters_of(prunable.values()).values()
    stored = source.stored_dtype().itemsize if keep_model else 0
    return {
        "masks": sum(weight.numel() for weight in pruned) // 8,
        "moved weights": sum(weight.nbytes for weight in pruned) if options.moves_weights else 0,
        "model": sum(weight.numel() for weight in model.parameters()) * stored,
    }


def _masks(model: OpenModel, data: TokenData, run: RunDirectory, options: RunOptions) -> Masks:
    """The masks of a run: those that an earlier start has written, or pruned now."""
    if run.has_masks:
        log.info(f"{run.masks} holds the masks of this run: nothing to prune")
        masks = Masks.load(run.masks)
        masks.validate_for(model.model)
        return masks
    assert options.criterion is not None
    assert options.pattern is not None
    return prune_to(
        run.masks,
        model.model,
        data.tokens("train"),
        options.criterion,
        options.pattern,
        options.pruning,
        run.moved,
        model.replay,
        model.storage,
    )


class _Costs:
    """The peaks of this process from now on, and the report that they go into.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline, self._meter = resident_bytes(), PeakMeter()
        self._meter.start()

    def stop(self) -> None:
        """Measure no further."""
        self._peaks = self._meter.stop()

    def report(
        self, source: ModelSource, data: TokenData, evaluation: Evaluation, resumed: bool | None = None, **more: Any
    ) -> Report:
        """The report of a model, with `more` of its fields; of pruning it tells whether an earlier start did that."""
        known = {} if resumed is None else {"resumed": resumed}
        return Report(
            model=source.name,
            seed=data.seed,
            perplexity=evaluation.perplexity,
            protocol=evaluation.protocol | data.carving("test"),
            peak_host_bytes=self._peaks.host_bytes,
            peak_device_bytes=self._peaks.device_allocated_bytes,
            baseline_host_bytes=self._baseline,
            environment=environment(self._device) | known,
            losses={"model": evaluation.losses} | more.pop("losses_of_others", {}),
            **more,
        )


def _compared(
    source: ModelSource,
    model: OpenModel,
    masks: Masks,
    data: TokenData,
    opened: Opener,
    options: RunOptions,
    run: RunDirectory,
) -> dict[str, Any]:
    """The fields of a report that compare a pruned model with the dense one, which is loaded for that."""
    fields: dict[str, Any] = {}
    if not (options.baselines or options.drift):
        return fields
    dense = opened(source)
    if options.baselines:
        measured = dense.evaluate(data)
        fields["dense_perplexity"], fields["losses_of_others"] = measured.perplexity, {"dense": measured.losses}
        fields["references"] = {"dense": sparsities(dense.parameters(), masks) | source_size(source)}
        assert data.tokenizer is not None
        if tasks := score_tasks(options.suite, dense, data.tokenizer, "dense", run):
            fields["references"]["dense"]["tasks"] = tasks
    if options.drift:
        fields["drift"] = asdict(dense.drift_to(model, data))
    return fields
