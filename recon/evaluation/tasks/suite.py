"""The tasks of a run: loaded before anything expensive, then scored on models in memory, one task at a time.

lm-evaluation-harness asks its questions and computes its metrics; nothing here knows a benchmark. The index of its
14,000 tasks takes seconds, and is made only if one of them is named.
"""

import copy
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.evaluation.tasks.options import TaskOptions, file_of, group_in, harness_version, shipped
from recon.profiling.out_of_memory import full_side

SEED = 1234
"""Chooses solved examples, and samples where a task samples: the default of lm-evaluation-harness. All seeds of a
comparison share it, as they share test sequences."""

BOOTSTRAPS = 1000
"""Resamples for the standard error of a metric that is no mean."""

Loaded = dict[str, Any]
"""What lm-evaluation-harness makes of a name: `tasks`, `groups` and `group_map`."""


class Suite:
    """The tasks of a run.

    Args:
        options: Which, and how they are asked; none by default.
    """

    def __init__(self, options: TaskOptions | None = None) -> None:
        self.options = options or TaskOptions()
        self._loaded: dict[str, Loaded] = {}

    def load(self) -> None:
        """Load all tasks with their documents, once.

        Raises:
            ValueError: If lm-evaluation-harness is not installed, a task is unknown, or its documents cannot be read.
        """
        if self._loaded or not self.options.names:
            return
        harness_version()
        files = {name: file_of(name) for name in self.options.names}
        local = {name: file for name, file in files.items() if file is not None}
        groups = {name: group for name, file in local.items() if (group := group_in(file))}
        from lm_eval.tasks import TaskManager

        # A group may have the tasks in the files beside its own.
        beside: Any = [local[name].absolute().parent for name in groups]
        manager = TaskManager(include_path=beside, include_defaults=len(local) < len(files))
        loaded: dict[str, Loaded] = {}
        for name, file in files.items():
            if file is None and name not in manager.all_tasks:
                raise ValueError(_unknown(name, manager.all_tasks))
            with _explained(name):
                one: Any = manager.load([groups.get(name) or (name if file is None else str(file))])
            for other, held in loaded.items():
                if both := one["tasks"].keys() & held["tasks"].keys():
                    raise ValueError(f"--tasks needs different tasks, got {min(both)} in {other} and {name}; drop one")
            for task in one["tasks"].values():
                self._set_fewshot(task)
            loaded[name] = one
        self._loaded = loaded

    def _set_fewshot(self, task: Any) -> None:
        """As the harness's command does: a task that asks for no examples gets none."""
        own, wanted = task.get_config("num_fewshot"), self.options.num_fewshot
        if own is None or (wanted is not None and own != 0):
            task.set_config(key="num_fewshot", value=wanted or 0)
        task.set_fewshot_seed(seed=SEED)

    def score(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """The scores of a model on a task, or on each task of a group whose scores have no mean.

        Args:
            name: One of the names in the options.
            model: In evaluation mode, on the device to compute on.
            tokenizer: Its tokenizer, left as it is.

        Returns:
            Name of the task -> `metrics`, each with `value` and `stderr` (over documents; None if it has none), `main`,
            the first of them, `num_documents`, `num_fewshot`, `limit`, and the `version`s of the task and of `lm_eval`.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        self.load()
        loaded = self._loaded[name]
        harness: Any = HFLM
        asked = harness(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token, which must not be saved with the model
            batch_size=self.options.task_batch_size,
            softmax_dtype=torch.float32,  # as perplexity: bf16 has two digits
        )
        with _isolated(), _without_bars(), _explained(name):
            results: Any = evaluate(asked, loaded, self.options.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
        for task in loaded["tasks"].values():
            task._instances = None  # the answers to one model must not be the next one's
        return {key: self._scores(key, found, results) for key, found in _summaries(results).items()}

    def _scores(self, name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
        members = _members(name, results)
        metrics = _metrics(found)
        return {
            "main": next(iter(metrics), None),
            "metrics": metrics,
            "num_documents": sum(results["n-samples"][one]["effective"] for one in members),
            "num_fewshot": results["n-shot"].get(name),
            "limit": self.options.limit,
            "version": str(results["versions"].get(name)),
            "lm_eval": harness_version(),
        }


def _summaries(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the outermost groups that have a mean, and of the tasks that are in none of them."""
    groups = results.get("groups", {})
    within = {one for group in groups for one in _below(group, results)}
    found = {**groups, **results["results"]}
    return {name: metrics for name, metrics in found.items() if name not in within}


def _below(name: str, results: Mapping[str, Any]) -> Iterator[str]:
    for child in results["group_subtasks"].get(name, []):
        yield child
        yield from _below(child, results)


def _members(name: str, results: Mapping[str, Any]) -> set[str]:
    """The tasks behind a name, each once."""
    return {one for one in (name, *_below(name, results)) if one in results["n-samples"]}


def _metrics(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Name of each metric, with its filter if it has one, -> `value` and `stderr`."""
    metrics = {}
    for key, value in found.items():
        metric, comma, by = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        title = metric if by == "none" else f"{metric} ({by})"
        metrics[title] = {"value": _finite(value), "stderr": _finite(found.get(f"{metric}_stderr,{by}"))}
    return metrics


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _unknown(name: str, known: list[str]) -> str:
    close = get_close_matches(name, [*shipped(), *known], n=3, cutoff=0.7)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return (
        f"--tasks needs tasks of lm-evaluation-harness ({harness_version()} is installed), {', '.join(shipped())}, or "
        f"YAML files, got {name}{hint}; `lm_eval ls tasks` lists them"
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say which task failed, of the many errors that the harness, `datasets` and the hub have.

    Raises:
        ValueError: With the cure.
    """
    try:
        yield
    except Exception as error:
        if full_side(error) is not None:
            raise ValueError(
                f"memory ran out on the task {name}; choose a smaller --task_batch_size, or leave out --tasks"
            ) from error
        reason = shorten(f"{type(error).__name__}: {error.__cause__ or error}", 300)
        raise ValueError(
            f"the task {name} must be one that can be read and scored here, got {reason}; a task of the hub needs the "
            f"network once (unset HF_HUB_OFFLINE, or fill the cache on a machine that has one), {', '.join(shipped())} "
            f"needs none"
        ) from error


@contextmanager
def _isolated() -> Iterator[None]:
    """Seed all random numbers inside, and restore them: a run trains as if nothing had been scored."""
    with isolate_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        yield


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the harness from drawing progress bars, which it has no option for."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    held = [module.tqdm for module in modules]
    for module, bar in zip(modules, held, strict=True):
        module.tqdm = partial(_drawn_nowhere, bar)
    try:
        yield
    finally:
        for module, bar in zip(modules, held, strict=True):
            module.tqdm = bar


def _drawn_nowhere(bar: Any, *args: Any, **options: Any) -> Any:
    return bar(*args, **{**options, "disable": True})
