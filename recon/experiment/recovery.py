"""One run from the dense model to the report: load, prune, recover, save, evaluate.

Every step leaves a file in the run directory, so a run that was killed goes on where it was, and a
finished one is not repeated.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from recon.basics.files import locked
from recon.data import TokenData
from recon.distributed import ranks
from recon.distributed.part import Share
from recon.evaluation.blockwise import evaluate_blockwise, measure_drift_blockwise
from recon.evaluation.drift import Drift, measure_drift
from recon.evaluation.perplexity import Evaluation, evaluate
from recon.experiment import checkpoints
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory, save_model
from recon.experiment.environment import environment
from recon.experiment.hyperparameters import log_hyperparameters
from recon.experiment.peaks import largest, peaks_of
from recon.models.loading import ModelSource
from recon.models.offload.opening import DENSE, open_offloaded
from recon.models.replay import Replay
from recon.profiling.phases import Phases
from recon.pruning.criteria import Criterion
from recon.pruning.interleaved import MASKS, Interleaved
from recon.pruning.masks import Masks
from recon.pruning.patterns import Pattern
from recon.pruning.prune import CAME_WITH_MOVED, Pruning, block_patterns, moved_with, prune_to
from recon.pruning.start_weights import EXACT, Start, amend_by, apply
from recon.report import Report
from recon.scopes.base import NO_MOVED, Scope
from recon.scopes.local.module import LocalScope


def recover(
    scope: Scope,
    data: TokenData,
    trainer: L.Trainer,
    run: RunDirectory,
    criterion: Criterion | None,
    pattern: Pattern | None,
    pruning: Pruning | None = None,
    masks_file: Path | None = None,
    baselines: bool = True,
    evaluate_on: Literal["test", "validation"] = "test",
    drift: bool = True,
    say: Callable[[str], None] = print,
    share: Share | None = None,
    merge: bool = False,
    predict: Callable[[], dict[str, Any]] = dict,
) -> Report | None:
    """Prune a model, recover it at one scope, save and evaluate it.

    With several processes, every one of them calls this. Rank 0 alone prunes, saves and evaluates; `run` is
    a directory that all of them see. Jobs that do not know of each other may each recover a `share` of the windows in
    one directory, at the same time or not; the last call, without a share, finds all of them there.

    Args:
        scope: The recovery scope; names the model.
        data: Calibration, validation and test tokens.
        trainer: Runs the scope's fit; its callbacks are told the phases.
        run: Where everything goes.
        criterion: How much a weight matters; None (with `pattern` None) trains a model that is not pruned.
        pattern: Which zeros are allowed.
        pruning: How the model is walked.
        masks_file: Masks computed before, used instead of pruning.
        baselines: Evaluate the dense and the pruned model too.
        evaluate_on: The split that perplexities are measured on; the report's protocol names it.
        drift: Measure how far the written model is from the dense one, which loads both at once; left out where
            nothing was pruned, and where the model is too large for one process.
        say: Is told what is going on, in lines.
        share: Recover these windows only, and end: nothing is saved or evaluated.
        merge: Train nothing: all windows have to be there.
        predict: What the run is expected to need, for the report; called once its processes are connected.

    Returns:
        The report, also written to the run directory; None on ranks other than 0, and of a share.

    Raises:
        ValueError: If options, masks and model do not fit together, or a pruned weight is not zero in the end;
            the model is then not saved.
    """
    resumed = run.has_begun
    if run.report.exists():
        report = Report.load(run.report)
        if report.protocol["split"] != evaluate_on:
            raise ValueError(
                f"--evaluate_on {evaluate_on} needs a run that was evaluated there, got {run.path}, finished on the "
                f"{report.protocol['split']} split; name another --run_dir, or delete its report.json"
            )
        say(f"{run.path} holds this run, finished: nothing to do")
        return report
    data.evaluate_on = evaluate_on
    scope.directory = run.path
    scope.require_trainer(trainer)
    if share is not None:
        _require_divisible(scope, trainer, share)
        baselines = False
    if not scope.loads_whole and (baselines or not (run.masks.exists() or masks_file)):
        raise ValueError(
            "model.partitioned needs masks made before, since pruning takes the whole model, and no baselines; give "
            "--masks <masks.safetensors of recon prune> and --baselines false"
        )
    if scope.start == "moved" and masks_file is None and not (criterion is not None and criterion.moves_weights):
        raise ValueError(NO_MOVED.format(f"and {criterion or 'no criterion'} moves none"))
    ranks.start(trainer, scope)
    if isinstance(scope, LocalScope):
        assembles = share is None and ranks.rank() == 0
        scope.divide(share or Share(ranks.rank(), ranks.size()), assembles)
    if ranks.rank() != 0:
        say = lambda line: None  # noqa: E731
    begin(data, trainer)
    phases = scope.phases = Phases(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    device = trainer.strategy.root_device
    dense, pruned = None, None
    predicted = predict()
    with phases.run(run.path if share is None else run.part(share), device):
        phases.enter("load")
        say(f"load {scope.source.name}")
        with ranks.rank_zero_first():
            scope.load(data)
            masks, moved, interleaved = Masks({}), None, None
            if criterion is not None and pattern is not None:
                phases.enter("prune")
                if pruning is not None and pruning.inputs == "recovered":
                    interleaved = _interleaved(scope, data, run, criterion, pattern, pruning, masks_file, device, say)
                else:
                    with locked(run.path / ".masks.lock") if share is not None else nullcontext():
                        masks = _masks(scope, data, run, criterion, pattern, pruning, masks_file, device, say)
                if masks and (baselines or scope.start == "moved"):
                    moved = moved_with(run.masks, masks)
            if baselines and masks and ranks.rank() == 0:
                phases.enter("evaluate dense and pruned")
                dense, pruned = _baselines(scope, data, masks, moved, run, device, say)
            phases.enter("prepare")
            if scope.offload != "none" or (scope.start == "exact" and ranks.rank() == 0):
                scope.to(device)
            scope.prepare(data, masks, run.path, moved, say, interleaved)
        for split in ("train", "validation"):
            data.tokens(split)  # now: to tokenise is no part of recovery's seconds
        if merge:
            _require_complete(scope, run)
        missing = scope.missing(scope.own_windows) if isinstance(scope, LocalScope) else []
        checkpoint = checkpoints.last(run.checkpoints)
        if checkpoint is not None:
            checkpoints.require_same(checkpoint, checkpoints.identity(trainer, masks))
            say(f"go on from {checkpoint}")
        phases.enter("train")
        ranks.meet()  # or the first would count how long the others load
        started = time.monotonic()
        trainer.fit(scope, datamodule=scope.fit_data(data), ckpt_path=checkpoint, weights_only=True)
        seconds = scope.start_seconds + time.monotonic() - started
        phases.leave()
        peaks = ranks.gathered(peaks_of(run.memory(ranks.rank(), share)))
        if share is not None and isinstance(scope, LocalScope):
            if missing:  # a job that finds its windows done measures nothing
                resumed = len(missing) < len(scope.own_windows)
                run.write_part(share, {"seconds": seconds, "resumed": resumed, "peaks": peaks[0]})
            return None
        if ranks.rank() != 0:
            return None
        layout = ranks.layout(trainer)
        if not missing and (parts := run.parts()):  # by jobs of their own, which may have run at the same time
            seconds, resumed = max(part["seconds"] for part in parts), any(part["resumed"] for part in parts)
            peaks = [part["peaks"] for part in parts]
            layout |= {"processes": len(parts), "strategy": "jobs"}
        phases.enter("save")
        if interleaved is not None:
            assert pattern is not None
            assert pruning is not None
            masks = scope.masks
            masks.save(run.masks, {"criterion": str(criterion), "pattern": pruning.describe(pattern)})
        chosen = {"criterion": "none", "pattern": "none"} | (Masks.read_metadata(run.masks) if masks else {})
        assert data.tokenizer is not None
        model, state = scope.result()
        save_model(model, data.tokenizer, run.model, state)
        del model, state, scope.model
        if baselines and interleaved is not None:
            phases.enter("evaluate dense and pruned")
            dense, pruned = _baselines(scope, data, masks, None, run, device, say)
        phases.enter("evaluate")
        recovered, violations = _measure_written(scope, data, masks, run, device)
        drifted = None
        if drift and masks and scope.evaluation is None:
            phases.enter("drift")
            drifted = _drift(scope, data, run, device)
    report = Report(
        scope=scope.scope,
        label=scope.label,
        model=scope.source.name,
        criterion=chosen["criterion"],
        pattern=chosen["pattern"],
        seed=data.seed,
        perplexity=recovered.perplexity,
        dense_perplexity=dense and dense.perplexity,
        pruned_perplexity=pruned and pruned.perplexity,
        sparsity=masks.sparsity if masks else 0.0,
        mask_violations=violations,
        seconds=seconds,
        train_tokens=scope.train_tokens,
        protocol=recovered.protocol,
        run_dir=str(run.path),
        # The seconds of a resumed run are those of its last start.
        environment=environment(device) | {"resumed": resumed} | layout,
        ranks=peaks,
        prediction=predicted,
        throughput=_throughput(trainer),
        drift=asdict(drifted) if drifted else {},
        peak_host_bytes=largest(peaks, "peak_host_bytes"),
        peak_device_bytes=largest(peaks, "peak_device_bytes"),
        baseline_host_bytes=largest(peaks, "baseline_host_bytes"),
    )
    report.save(run.report)
    log_hyperparameters(trainer, scope, report)
    data.teardown("test")
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # a finished run is not trained on
    shutil.rmtree(run.path / MASKS, ignore_errors=True)  # in masks.safetensors, all of them
    shutil.rmtree(run.path / DENSE, ignore_errors=True)
    (run.path / EXACT).unlink(missing_ok=True)
    return report


def _require_divisible(scope: Scope, trainer: L.Trainer, share: Share) -> None:
    if not isinstance(scope, LocalScope):
        raise ValueError(
            f"--windows {share} needs a scope that has windows, got the {scope.scope} scope; choose scopes/submodule, "
            f"scopes/block or scopes/matrix"
        )
    if trainer.num_devices * trainer.num_nodes > 1:
        raise ValueError(
            f"--windows {share} recovers its windows in one process, got trainer.devices and trainer.num_nodes that "
            f"make {trainer.num_devices * trainer.num_nodes}; set both to 1, or leave out --windows"
        )
    scope.require_independent(f"--windows {share}")


def _require_complete(scope: Scope, run: RunDirectory) -> None:
    if not isinstance(scope, LocalScope):
        raise ValueError(f"merge needs a run of a local scope, got {run.path} of the {scope.scope} scope")
    if missing := scope.missing(scope.windows):
        raise ValueError(
            f"merge needs all {len(scope.windows)} windows of the run, got {run.path}, which lacks {len(missing)}, "
            f"{missing[0].name} the first; run the parts that have not ended again, or recon fit without --windows"
        )


def _masks(
    scope: Scope,
    data: TokenData,
    run: RunDirectory,
    criterion: Criterion,
    pattern: Pattern,
    pruning: Pruning | None,
    masks_file: Path | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Masks:
    """The masks of this run: from its directory, from the file given, or by pruning the model now."""
    for file in (run.masks, masks_file):
        if file is not None and file.exists():
            masks, made_by = Masks.load(file), Masks.read_metadata(file)
            masks.validate_for(scope.model)
            if CAME_WITH_MOVED in made_by:
                made_by[CAME_WITH_MOVED] = str((file.parent / made_by[CAME_WITH_MOVED]).resolve())
            if file != run.masks:
                masks.save(run.masks, made_by)
            return masks
    if masks_file is not None:
        raise ValueError(f"--masks needs a file that `recon prune` wrote, got {masks_file}, which does not exist")
    replay, tokens = scope.to(device).open_replay(), data.tokens("train")
    return prune_to(run.masks, scope.model, tokens, criterion, pattern, pruning, say, replay, scope.storage)


def _interleaved(
    scope: Scope,
    data: TokenData,
    run: RunDirectory,
    criterion: Criterion,
    pattern: Pattern,
    pruning: Pruning,
    masks_file: Path | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Interleaved:
    """How the scope is to choose the masks; the allocation, if there is one, is settled now, on the dense model."""
    if not isinstance(scope, LocalScope) or masks_file is not None or pattern.across_model:
        got = f"--masks {masks_file}" if masks_file else f"a pattern {pattern}" if pattern.across_model else scope.scope
        raise ValueError(
            f"pruning.inputs: recovered chooses masks block by block along with recovery, which needs a local scope, a "
            f"pattern per row, matrix or group, and no masks made before, got {got}; choose pruning.inputs: dense"
        )
    replay = scope.to(device).open_replay()
    patterns = block_patterns(replay, data.tokens("train"), criterion, pattern, pruning, say, scope.storage)
    return Interleaved(criterion, patterns, replay.anatomy.prunable(pruning.exclude), run.path)


def _baselines(
    scope: Scope,
    data: TokenData,
    masks: Masks,
    moved: Start | None,
    run: RunDirectory,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Evaluation, Evaluation]:
    """Perplexity of the dense and the pruned model, on a copy that does not outlive the call."""
    if scope.offload == "none":
        model = scope.source.model(device)
        dense = evaluate(model, data.evaluation_dataloader(), data.evaluate_on)
        apply(model, masks, moved)
        pruned = evaluate(model, data.evaluation_dataloader(), data.evaluate_on)
    else:
        replay = _reopened(scope, scope.source, run, device)
        dense = _evaluate_blockwise(replay, scope, data)
        assert replay.residence is not None
        replay.residence.amend = amend_by(masks, moved, replay.residence)
        pruned = _evaluate_blockwise(replay, scope, data)
    say(f"{data.evaluate_on} perplexity  dense {dense.perplexity:.3f}  pruned {pruned.perplexity:.3f}")
    return dense, pruned


def _measure_written(
    scope: Scope, data: TokenData, masks: Masks, run: RunDirectory, device: torch.device
) -> tuple[Evaluation, int]:
    """Perplexity and mask violations of the model as it was written."""
    if scope.evaluation is not None:  # too large to be loaded by one process: measured before it was gathered
        return scope.evaluation, masks.violations_in(run.model)
    if scope.offload != "none":
        evaluation = _evaluate_blockwise(_reopened(scope, _written(scope, run), run, device), scope, data)
        return evaluation, masks.violations_in(run.model)
    model = _written(scope, run).model(device)
    return evaluate(model, data.evaluation_dataloader(), data.evaluate_on), masks.violations(model)


def _drift(scope: Scope, data: TokenData, run: RunDirectory, device: torch.device) -> Drift:
    """How far the model as it was written is from the dense one."""
    written = _written(scope, run)
    if scope.offload == "none":
        return measure_drift(scope.source.model(device), written.model(device), data.val_dataloader())
    dense, recovered = (_reopened(scope, source, run, device) for source in (scope.source, written))
    return measure_drift_blockwise(
        dense, recovered, data.tokens("validation"), data.batch_size, storage=replace(scope.storage, dtype=None)
    )


def _reopened(scope: Scope, source: ModelSource, run: RunDirectory, device: torch.device) -> Replay:
    """Another copy of a model, offloaded as the scope's is."""
    return Replay.within(open_offloaded(source, scope.offload, device, run.path))


def _evaluate_blockwise(replay: Replay, scope: Scope, data: TokenData) -> Evaluation:
    # In the model's own precision: a perplexity does not depend on options.
    storage = replace(scope.storage, dtype=None)
    return evaluate_blockwise(replay, data.tokens(data.evaluate_on), data.batch_size, data.evaluate_on, storage)


def _written(scope: Scope, run: RunDirectory) -> ModelSource:
    return ModelSource(str(run.model), dtype="auto", trust_remote_code=scope.source.trust_remote_code)


def _throughput(trainer: L.Trainer) -> dict[str, float | None]:
    """What a callback with a `summary` measured of the speed of training."""
    summaries = [one.summary() for one in trainer.callbacks if hasattr(one, "summary")]  # pyright: ignore
    return summaries[0] if summaries else {}
