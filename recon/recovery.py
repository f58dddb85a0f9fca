"""One run from the dense model to the report: load, prune, recover, save, evaluate.

Every step leaves a file in the run directory, so a run that was killed goes on where it was, and a
finished one is not repeated.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from recon.criteria import Criterion
from recon.data import TokenData
from recon.environment import environment
from recon.evaluation import Evaluation, evaluate
from recon.masks import Masks
from recon.patterns import Pattern
from recon.phases import Phases
from recon.pruning import Pruning, prune
from recon.report import Report
from recon.run import RunDirectory, save_model
from recon.scopes.base import Scope

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
) -> Report:
    """Prune a model, recover it at one scope, save and evaluate it.

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
        The report, also written to the run directory.

    Raises:
        ValueError: If options, masks and model do not fit together, or a pruned weight is not zero in the end;
            the model is then not saved.
    """
    resumed = run.has_begun
    if run.report.exists():
        say(f"{run.path} holds this run, finished: nothing to do")
        return Report.load(run.report)
    phases = scope.phases = Phases(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    device = trainer.strategy.root_device
    with phases.run(run.path):
        phases.enter("load")
        say(f"load {scope.source.name}")
        scope.load(data)
        masks = Masks({})
        if criterion is not None and pattern is not None:
            phases.enter("prune")
            masks = _masks(scope, data, run, criterion, pattern, pruning, masks_file, device, say)
        chosen = {"criterion": "none", "pattern": "none"} | (Masks.read_metadata(run.masks) if masks else {})
        dense, pruned = None, None
        if baselines and masks:
            phases.enter("evaluate dense and pruned")
            dense, pruned = _baselines(scope, data, masks, device)
            say(f"test perplexity  dense {dense.perplexity:.3f}  pruned {pruned.perplexity:.3f}")
        phases.enter("prepare")
        scope.prepare(data, masks, run.path)
        phases.enter("train")
        started = time.monotonic()
        trainer.fit(scope, ckpt_path=run.last_checkpoint, weights_only=True)
        seconds = time.monotonic() - started
        phases.enter("save")
        if scope.save_dtype is not None:
            scope.model.to(getattr(torch, scope.save_dtype))
        masks.check(scope.model)
        assert data.tokenizer is not None
        save_model(scope.model, data.tokenizer, run.model)
        phases.enter("evaluate")
        recovered = evaluate(scope.to(device).model, data.test_dataloader())
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
        mask_violations=masks.violations(scope.model),
        seconds=seconds,
        train_tokens=scope.train_tokens,
        protocol=recovered.protocol,
        run_dir=str(run.path),
        environment=environment(device) | {"resumed": resumed},  # its seconds are then those of the last start
        **_peaks(run.memory),
    )
    report.save(run.report)
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
    made_by = {"criterion": str(criterion), "pattern": str(pattern)}
    for file in (run.masks, masks_file):
        if file is not None and file.exists():
            masks, made_by = Masks.load(file), Masks.read_metadata(file)
            masks.validate_for(scope.model)
            break
    else:
        if masks_file is not None:
            raise ValueError(f"--masks needs a file that `recon prune` wrote, got {masks_file}, which does not exist")
        masks = prune(scope.to(device).model, data.tokens("train"), criterion, pattern, pruning, say)
    if not run.masks.exists():
        masks.save(run.masks, made_by)
    return masks


def _baselines(scope: Scope, data: TokenData, masks: Masks, device: torch.device) -> tuple[Evaluation, Evaluation]:
    """Perplexity of the dense and the pruned model, on a copy that does not outlive the call."""
    model = scope.source.model(device)
    dense = evaluate(model, data.test_dataloader())
    masks.apply(model)
    return dense, evaluate(model, data.test_dataloader())


def _peaks(memory: dict[str, Any] | None) -> dict[str, Any]:
    """The largest peaks over the phases of `memory.json` that are recovery, as a report names them."""
    if memory is None:
        return {"peak_host_bytes": None, "peak_device_bytes": None, "baseline_host_bytes": None}
    phases = [phase for phase in memory["phases"] if phase["phase"] not in NOT_RECOVERY]
    device = [phase["device_allocated_bytes"] for phase in phases]
    return {
        "peak_host_bytes": max(phase["host_bytes"] for phase in phases),
        "peak_device_bytes": None if None in device else max(device),
        "baseline_host_bytes": memory["baseline_host_bytes"],
    }
