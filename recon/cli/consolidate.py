"""`recon consolidate`: the model in the last checkpoint of a full retraining, as a Hugging Face directory."""

from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from recon.basics.files import placing
from recon.basics.locks import owned
from recon.basics.refusals import UsageError
from recon.basics.run_paths import RunPaths
from recon.cli.configs import load_options
from recon.cli.quiet import quiet
from recon.experiment import checkpoints
from recon.experiment.consolidation import consolidate, require_weights
from recon.experiment.writing import save_model
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.scopes.lora import Lora, attach, merge_state

SOURCE = ("name", "shape", "dtype", "revision", "tokenizer", "trust_remote_code")


def main(args: list[str]) -> int:
    """Parse, read, check the masks, write."""
    quiet()
    parser = ArgumentParser(
        prog="recon consolidate",
        exit_on_error=False,
        description="Write the model in the last checkpoint of a full retraining in Hugging Face format; a run that "
        "ended has done this itself. Takes no GPU and the memory of one copy of the model.",
    )
    parser.add_argument("run_dir", type=str, help="The directory of the run.")
    parser.add_argument("--to", type=str | None, default=None, help="Where to write; <run_dir>/model-step-<n> if null.")
    config = parser.parse_args(args)
    run = RunPaths(Path(config.run_dir))
    if config.to is not None and not _is_free(Path(config.to)):
        raise UsageError(f"--to needs a new directory, or one with a model to replace, got {config.to}; name another")
    if not run.manifest.records(run.checkpoints):
        raise ValueError(
            f"consolidate needs a run of scopes/full that has a checkpoint, got {run.path}, which has none; a run "
            f"that ended has its model in {run.model}"
        )
    with owned(run.path):  # a run that goes on deletes its checkpoints
        checkpoint, to = write(run, None if config.to is None else Path(config.to))
    Console(highlight=False, soft_wrap=True).print(f"{checkpoint} written to {to}, masks exact")
    return 0


def write(run: RunPaths, to: Path | None) -> tuple[Path, Path]:
    """Write the model in the last checkpoint of a run, all files of which are checked first.

    Args:
        run: It is owned by this process.
        to: Where to write; beside the checkpoints, recorded in the run's manifest, if None.

    Returns:
        The checkpoint and the directory of the model.

    Raises:
        ValueError: If a file of the run is damaged, or this is no full retraining.
    """
    cure = "copy it again, or start the run again"
    checkpoint = checkpoints.last(run.checkpoints)
    assert checkpoint is not None
    checkpoints.require_intact(checkpoint)
    run.manifest.require(run.config, cure)
    options = load_options(run.config, ["model"])["model"]
    if missing := [name for name in (*SOURCE, "save_dtype") if name not in options.get("init_args", {})]:
        raise ValueError(
            f"consolidate needs the options of the model, got {run.config} without model.{missing[0]}, made by another "
            f"version of recon; use that version"
        )
    if not options.get("class_path", "").endswith(".FullRetraining"):
        raise ValueError(f"consolidate needs a run of FullRetraining, got {options.get('class_path')}; let the run end")
    source = ModelSource(**{name: options["init_args"][name] for name in SOURCE})
    named = options["init_args"]["save_dtype"]
    dtype = source.stored_dtype() if named is None else getattr(torch, named)
    model, weights = source.skeleton().to(dtype), consolidate(checkpoint)  # pyright: ignore[reportArgumentType]
    if options["init_args"].get("parameters") == "lora":
        run.manifest.require(run.masks, cure)
        masks = Masks.load(run.masks)
        merge_state(model, attach(model, masks, masks, Lora(**options["init_args"]["lora"]), seed=0), weights)
    weights = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}
    require_weights(checkpoint, weights, {name: one for name, one in model.state_dict().items() if name in weights})
    model.load_state_dict(weights, assign=True, strict=False)  # tied weights may be there under one name only
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{checkpoint} needs all of the model's weights, got {len(missing)} missing, the first "
            f"{missing[0]}; delete it to begin anew, or let the run end"
        )
    if run.manifest.records(run.masks) or run.masks.exists():
        run.manifest.require(run.masks, cure)
        Masks.load(run.masks).check(model)
    made = to or run.path / f"model-{checkpoint.stem}"
    save_model(model, source.load_tokenizer(), made, placing=placing if to else run.manifest.placing)
    return checkpoint, made


def _is_free(path: Path) -> bool:
    """Whether nothing but a model would be replaced."""
    return not path.exists() or (path.is_dir() and ((path / "config.json").exists() or not any(path.iterdir())))
