"""What the worker processes of the distributed tests run: `recon fit` on two blocks of the bundled model."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from recon.cli.fit import main
from recon.cli.prune import main as prune
from recon.distributed.parameters import copies
from recon.experiment import recovery
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.scopes.best import BestWeights

STEPS = 8
"""Optimizer steps: 64 sequences in global batches of 8, accumulated over 2, 2 epochs."""


class Watch(Callback):
    """The largest size of a pruned weight in each copy, every fourth batch."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 4 == 3:
            parameters = dict(pl_module.model.named_parameters())
            for name, keep in pl_module.masks.items():
                for which, copy in copies(parameters[name]):
                    self.largest[which] = max(self.largest.get(which, 0.0), float(copy[~keep].abs().max()))


class OnlyWorkingCopy(Callback):
    """The usual advice, which leaves DeepSpeed's master copies to drift: zero the weights after each step."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for name, keep in pl_module.masks.items():
            pl_module.model.get_parameter(name).data.masked_fill_(~keep, 0)


class Stop(Callback):
    """Sends `number` to this process, or only to rank 1, when a batch begins; the batches count over epochs."""

    def __init__(self, number: signal.Signals, batch: int, only_rank_1: bool = False) -> None:
        self.number, self.batch, self.only_rank_1 = number, batch, only_rank_1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx
        if done == self.batch and (trainer.global_rank == 1 or not self.only_rank_1):
            os.kill(os.getpid(), self.number)


class Fail(Callback):
    """Raises when a batch begins; the batches count over epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise RuntimeError("the test says stop")


def options(strategy: str, precision: str, world: int, run_dir: Path) -> list[str]:
    """Arguments of `recon fit` for two epochs with accumulation, clipping and one global batch size."""
    masks = run_dir.parent.parent / "masks"
    named = ["-c", f"strategies/{strategy}"] if strategy != "auto" else []
    if strategy.startswith("zero3"):  # this model's parameters would otherwise all stay whole
        named += ["--trainer.strategy.init_args.min_partitioned", "0"]
    return [
        *("-c", "scopes/full", *named),
        *("--data.num_sequences", "64", "--data.seq_len", "32", "--data.num_validation", "8", "--data.num_test", "8"),
        *("--data.batch_size", str(8 // world), "--model.epochs", "2", "--model.lr", "1e-3"),
        *("--model.weight_decay", "0.1", "--trainer.accumulate_grad_batches", "2"),
        *("--trainer.gradient_clip_val", "0.5", "--trainer.precision", precision),
        *("--model.name", str(masks / "source"), "--masks", str(masks / "masks.safetensors"), "--baselines", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(world)),
        *("--run_dir", str(run_dir), "--summary", "false"),
    ]


def fit(strategy: str, precision: str, world: int, run_dir: Path, *more: str) -> dict[str, float]:
    """Run `recon fit`; returns the largest sizes of pruned weights by copy."""
    watch = Watch()
    main_with(watch, [*options(strategy, precision, world, run_dir), *more])
    return watch.largest


def fit_keeping_checkpoint(strategy: str, precision: str, world: int, run_dir: Path, *more: str) -> dict[str, float]:
    """As `fit`, with a checkpoint after the last step that the end of the run leaves there."""
    with mock.patch("recon.experiment.directory.RunDirectory.clean"):
        return fit(strategy, precision, world, run_dir, "--checkpoint_every_n_steps", str(STEPS), *more)


def fit_best_first(strategy: str, precision: str, world: int, run_dir: Path, *more: str) -> None:
    """Run `recon fit` with held-out losses that rise: the steps before them."""
    offer = BestWeights.offer

    def rising(best: BestWeights, loss: float, step: int, model: Any) -> None:
        offer(best, float(step), step, model)

    with mock.patch.object(BestWeights, "offer", rising):
        fit(strategy, precision, world, run_dir, *more)


class WatchShards(Callback):
    """The precision in which FSDP2 gathers a block, and how often it reduces gradients."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.num_reduced = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        inner = next(iter(Anatomy.of(pl_module.model).blocks[0].matrices.values())).module
        inner.register_forward_hook(lambda module, *_: self.dtypes.add(module.get_parameter("weight").dtype))


def fit_watching_shards(precision: str, run_dir: Path, *more: str) -> tuple[set[torch.dtype], int]:
    """Run `recon fit` under FSDP2; returns the precisions of gathered weights, and the number of reductions."""
    watch, reduce = WatchShards(), _fsdp_param_group.foreach_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        watch.num_reduced += 1
        return reduce(*args, **kwargs)

    with mock.patch.object(_fsdp_param_group, "foreach_reduce", counting):
        main_with(watch, [*options("fsdp2", precision, 2, run_dir), *more])
    return watch.dtypes, watch.num_reduced


def fit_and_stop(stop: Callback, strategy: str, precision: str, world: int, run_dir: Path, *more: str) -> None:
    """Run `recon fit` until `stop` stops it."""
    main_with(stop, [*options(strategy, precision, world, run_dir), *more])


def prune_model(directory: Path) -> None:
    """Make the model that all runs share, the first two blocks of the bundled one, and its masks."""
    model, tokenizer = ModelSource().load()
    model.config.num_hidden_layers = 2
    del model.model.layers[2:]
    for part in (model, tokenizer):
        part.save_pretrained(directory / "source")
    data = ["--data.num_sequences", "8", "--data.seq_len", "32", "--data.num_test", "4"]
    prune(["--model.name", str(directory / "source"), "--run_dir", str(directory), *data, "--summary", "false"])


def train_without_enforcer(strategy: str, run_dir: Path, *more: str) -> None:
    """Train under the usual advice instead of MaskEnforcer, which scopes attach otherwise."""
    with mock.patch("recon.scopes.base.Scope.configure_callbacks", return_value=[]):
        main_with(OnlyWorkingCopy(), [*options(strategy, "32-true", 2, run_dir), *more])


def main_with(callback: Callback, args: list[str], command: Callable[[list[str]], Any] = main) -> None:
    """`recon fit`, or another command that fits, with one callback more."""

    def recover(scope: Any, data: Any, trainer: L.Trainer, *more: Any) -> Any:
        trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]
        return recovery.recover(scope, data, trainer, *more)

    with mock.patch("recon.cli.fit.recover", recover):
        command(args)


def weights(run_dir: Path) -> dict[str, Tensor]:
    """The weights that a run wrote."""
    return load_file(run_dir / "model" / "model.safetensors")


def largest_pruned(run_dir: Path) -> float:
    """The largest size of a pruned weight in the file that a run wrote."""
    masks, written = Masks.load(run_dir / "masks.safetensors"), weights(run_dir)
    return max(float(written[name][~keep].abs().max()) for name, keep in masks.items())


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of the difference between two sets of weights, relative to that of the first.

    Not the largest difference: Adam divides by the size of each gradient, which makes rounding of the few that
    are almost zero visible (20 of 1.5 million weights differ by more than 1e-6, at most by 1e-5).
    """
    assert one.keys() == other.keys()
    first, second = (torch.cat([weight.flatten().float() for weight in which.values()]) for which in (one, other))
    return float((first - second).norm() / first.norm())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
