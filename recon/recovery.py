"""One run from the dense model to the report: load, prune, recover, save, evaluate.

Every step leaves a file in the run directory, so a run that was killed goes on where it was, and a
finished one is not repeated.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from recon import checkpoints, ranks
from recon.criteria import Criterion
from recon.data import TokenData
from recon.environment import environment
from recon.evaluation import Evaluation, evaluate
from recon.masks import Masks
from recon.patterns import Pattern
from recon.phases import Phases
from recon.pretrained import ModelSource
from recon.pruning import CAME_WITH_MOVED, Pruning, moved_with, prune_to
from recon.report import Report
from recon.run import RunDirectory, save_model
from recon.scopes.base import NO_MOVED, Scope
from recon.start import EXACT, Start, apply

NOT_RECOVERY = ("prune", "evaluate dense and pruned", "evaluate")
"""Phases that cost the same whatever the scope; a report's peaks leave them out."""


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
    say: Callable[[str], None] = print,
) -> Report | None:
    """Prune a model, recover it at one scope, save and evaluate it.

    With several processes, every one of them calls this. Rank 0 alone prunes, saves and evaluates; `run` is
    a directory that all of them see.

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
        say: Is told what is going on, in lines.

    Returns:
        The report, also written to the run directory; None on ranks other than 0.

    Raises:
        ValueError: If options, masks and model do not fit together, or a pruned weight is not zero in the end;
            the model is then not saved.
    """
    resumed = run.has_begun
    if run.report.exists():
        say(f"{run.path} holds this run, finished: nothing to do")
        return Report.load(run.report)
    scope.require_strategy(trainer)
    if not scope.loads_whole and (baselines or not (run.masks.exists() or masks_file)):
        raise ValueError(
            "model.partitioned needs masks made before, since pruning takes the whole model, and no baselines; give "
            "--masks <masks.safetensors of recon prune> and --baselines false"
        )
    if scope.start == "moved" and masks_file is None and not (criterion is not None and criterion.moves_weights):
        raise ValueError(NO_MOVED.format(f"and {criterion or 'no criterion'} moves none"))
    ranks.start(trainer, scope)
    if ranks.rank() != 0:
        say = lambda line: None  # noqa: E731
    phases = scope.phases = Phases(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    device = trainer.strategy.root_device
    dense, pruned = None, None
    with phases.run(run.path):
        phases.enter("load")
        say(f"load {scope.source.name}")
        with ranks.rank_zero_first():
            scope.load(data)
            masks, moved = Masks({}), None
            if criterion is not None and pattern is not None:
                phases.enter("prune")
                masks = _masks(scope, data, run, criterion, pattern, pruning, masks_file, device, say)
                if baselines or scope.start == "moved":
                    moved = moved_with(run.masks, masks)
            chosen = {"criterion": "none", "pattern": "none"} | (Masks.read_metadata(run.masks) if masks else {})
            if baselines and masks and ranks.rank() == 0:
                phases.enter("evaluate dense and pruned")
                dense, pruned = _baselines(scope, data, masks, moved, device)
                say(f"test perplexity  dense {dense.perplexity:.3f}  pruned {pruned.perplexity:.3f}")
            phases.enter("prepare")
            if scope.start == "exact" and ranks.rank() == 0:
                scope.to(device)
            scope.prepare(data, masks, run.path, moved, say)
        checkpoint = checkpoints.last(run.checkpoints)
        if checkpoint is not None:
            checkpoints.require_same(checkpoint, checkpoints.identity(trainer, masks))
            say(f"go on from {checkpoint}")
        phases.enter("train")
        started = time.monotonic()
        trainer.fit(scope, ckpt_path=checkpoint, weights_only=True)
        seconds = scope.start_seconds + time.monotonic() - started
        phases.leave()
        peaks = ranks.gathered(_peaks(run.memory(ranks.rank())))
        if ranks.rank() != 0:
            return None
        phases.enter("save")
        assert data.tokenizer is not None
        model, state = scope.result()
        save_model(model, data.tokenizer, run.model, state)
        del model, state, scope.model
        phases.enter("evaluate")
        recovered, violations = _measure_written(scope, data, masks, run, device)
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
        environment=environment(device) | {"resumed": resumed} | ranks.layout(trainer),
        ranks=peaks,
        throughput=_throughput(trainer),
        peak_host_bytes=_largest(peaks, "peak_host_bytes"),
        peak_device_bytes=_largest(peaks, "peak_device_bytes"),
        baseline_host_bytes=_largest(peaks, "baseline_host_bytes"),
    )
    report.save(run.report)
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # a finished run is not trained on
    (run.path / EXACT).unlink(missing_ok=True)
    return report


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
    return prune_to(run.masks, scope.to(device).model, data.tokens("train"), criterion, pattern, pruning, say)


def _baselines(
    scope: Scope, data: TokenData, masks: Masks, moved: Start | None, device: torch.device
) -> tuple[Evaluation, Evaluation]:
    """Perplexity of the dense and the pruned model, on a copy that does not outlive the call."""
    model = scope.source.model(device)
    dense = evaluate(model, data.test_dataloader())
    apply(model, masks, moved)
    return dense, evaluate(model, data.test_dataloader())


def _measure_written(
    scope: Scope, data: TokenData, masks: Masks, run: RunDirectory, device: torch.device
) -> tuple[Evaluation, int]:
    """Perplexity and mask violations of the model as it was written."""
    if scope.evaluation is not None:  # too large to be loaded by one process: measured before it was gathered
        return scope.evaluation, masks.violations_in(run.model)
    source = ModelSource(str(run.model), dtype="auto", trust_remote_code=scope.source.trust_remote_code)
    model = source.model(device)
    return evaluate(model, data.test_dataloader()), masks.violations(model)


def _peaks(memory: dict[str, Any] | None) -> dict[str, int | None]:
    """The largest figures over the phases of `memory.json` that are recovery, as a report names them."""
    memory = memory or {"phases": [], "baseline_host_bytes": None}
    phases = [phase for phase in memory["phases"] if phase["phase"] not in NOT_RECOVERY]
    splits = [phase["split"] for phase in phases if phase.get("split")]
    return {
        "peak_host_bytes": _largest(phases, "host_bytes"),
        "peak_device_bytes": _largest(phases, "device_allocated_bytes"),
        "baseline_host_bytes": memory["baseline_host_bytes"],
        **{
            name: _largest(splits, name)
            for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "on_host_bytes")
        },
    }


def _throughput(trainer: L.Trainer) -> dict[str, float | None]:
    """What a callback with a `summary` measured of the speed of training."""
    summaries = [one.summary() for one in trainer.callbacks if hasattr(one, "summary")]  # pyright: ignore
    return summaries[0] if summaries else {}


def _largest(rows: list[dict[str, Any]], name: str) -> int | None:
    values = [row[name] for row in rows if row[name] is not None]
    return max(values) if values else None
