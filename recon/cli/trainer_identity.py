"""The options of a trainer that decide what a run computes; the others only say where, or what is watched."""

from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

NOT_DECISIVE_OF_TRAINER = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "logger",
    "callbacks",
    "log_every_n_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "num_sanity_val_steps",
    "default_root_dir",
    "enable_autolog_hparams",
    "profiler",
    "detect_anomaly",
    "inference_mode",
    "barebones",
)
"""Options that do not; the number of processes and callbacks that change the training are added to what is left."""

DECISIVE_CALLBACKS = (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
"""Callbacks that decide what a run computes; others only watch it."""


def decisive(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a trainer that decide what a run computes, with the callbacks that do."""
    found = {name: value for name, value in options.items() if name not in NOT_DECISIVE_OF_TRAINER}
    callbacks = options.get("callbacks") or []
    specs = callbacks if isinstance(callbacks, list) else [callbacks]
    deciding = [one for one in specs if issubclass(class_at(one["class_path"]), DECISIVE_CALLBACKS)]
    return found | ({"callbacks": deciding} if deciding else {})


def class_at(path: str) -> type:
    """The class at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
