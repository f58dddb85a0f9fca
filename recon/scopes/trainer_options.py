"""Options of Lightning's trainer that a scope does not honour, each with its reason: refused before anything is loaded.

Options that are not here are honoured. `trainer.default_root_dir` is the command's: it is the run directory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

NOTHING = "nothing would be trained, and the pruned model reported as recovered; leave it out"
EPOCHS = "the scope knows how long a fit is; set model.epochs"
FEWER = "data.num_sequences decides what pruning, recovery and evaluation see; make it smaller"
HELD_OUT = "this scope measures the held-out error of each window itself, after every epoch; leave it out"


@dataclass(frozen=True)
class TrainerOption:
    """An option that is refused unless it is left as it is.

    Args:
        name: As an argument of `lightning.Trainer`.
        given: Reads it off a trainer: the value, or None if it is left as it is.
        reason: Why it is refused, and what to do instead.
    """

    name: str
    given: Callable[[Any], Any]
    reason: str


def refuse(options: Iterable[TrainerOption], trainer: L.Trainer, scope: str) -> None:
    """Refuse a trainer that has one of `options`.

    Raises:
        ValueError: Naming the option, its value, the scope and the cure.
    """
    for option in options:
        if (value := option.given(trainer)) is not None:
            raise ValueError(f"the {scope} scope does not take trainer.{option.name}, got {value}: {option.reason}")


def _unless(*usual: Any, of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def given(trainer: Any) -> Any:
        value = of(trainer)
        # A limit of 1 is one batch, one of 1.0 all of them.
        return None if any(type(value) is type(one) and value == one for one in usual) else value

    return given


def _if_zero(of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda trainer: 0 if of(trainer) == 0 else None


def _callback(kind: type) -> Callable[[Any], Any]:
    return lambda trainer: next((type(one).__name__ for one in trainer.callbacks if isinstance(one, kind)), None)


EVERYWHERE = (
    TrainerOption("max_steps", _if_zero(lambda trainer: trainer.max_steps), NOTHING),
    TrainerOption("limit_train_batches", _if_zero(lambda trainer: trainer.limit_train_batches), NOTHING),
    TrainerOption(
        "val_check_interval",
        _if_zero(lambda trainer: getattr(trainer, "val_check_interval", None)),
        "it is a number of batches, or a share of an epoch; leave it out to measure after each epoch",
    ),
    TrainerOption(
        "fast_dev_run",
        _unless(False, of=lambda trainer: trainer.fast_dev_run),
        "its one step would be saved and reported as a run; for a quick one set data.num_sequences: 8, model.epochs: 1",
    ),
    TrainerOption("max_epochs", _unless(None, -1, of=lambda trainer: trainer.fit_loop.max_epochs), EPOCHS),
    TrainerOption("min_epochs", _unless(None, 0, of=lambda trainer: trainer.fit_loop.min_epochs), EPOCHS),
    TrainerOption("min_steps", _unless(None, 0, of=lambda trainer: trainer.fit_loop.epoch_loop.min_steps), EPOCHS),
    TrainerOption(
        "max_time",
        _callback(Timer),
        "what a run computes must not depend on how fast the machine is; set fewer model.epochs, or stop it by "
        "SIGTERM: the same command goes on from there",
    ),
    TrainerOption("overfit_batches", _unless(0.0, of=lambda trainer: trainer.overfit_batches), FEWER),
    TrainerOption(
        "limit_test_batches",
        _unless(1.0, of=lambda trainer: trainer.limit_test_batches),
        "recon measures perplexity itself; set data.num_test",
    ),
    TrainerOption(
        "limit_predict_batches",
        _unless(1.0, of=lambda trainer: trainer.limit_predict_batches),
        "nothing is predicted; leave it out",
    ),
    TrainerOption(
        "inference_mode",
        _unless(True, of=lambda trainer: trainer.validate_loop.inference_mode),
        "a fit has no part that it applies to; leave it out",
    ),
    TrainerOption(
        "barebones", _unless(False, of=lambda trainer: trainer.barebones), "it turns off callbacks' logs; leave it out"
    ),
    TrainerOption(
        "sync_batchnorm",
        _unless(None, of=lambda trainer: trainer._accelerator_connector._layer_sync and True),
        "a language model has no batch norm; leave it out",
    ),
    TrainerOption(
        "model_registry",
        _unless(None, of=lambda trainer: trainer._model_registry),
        "a run writes its model to <run_dir>/model; upload it from there",
    ),
    TrainerOption(
        "gradient_clip_algorithm",
        lambda trainer: None if trainer.gradient_clip_val is not None else _clip_algorithm(trainer),
        "it needs trainer.gradient_clip_val; give both",
    ),
)
"""Refused by every scope."""

IN_WINDOWS = (
    TrainerOption(
        "max_steps",
        _unless(-1, of=lambda trainer: trainer.max_steps),
        "it goes through all its windows; set fewer model.epochs or a smaller data.num_sequences",
    ),
    TrainerOption(
        "callbacks",
        _callback(EarlyStopping),
        "it goes through all its windows, in which one loss says nothing of the next; leave it out",
    ),
    TrainerOption("limit_train_batches", _unless(1.0, of=lambda trainer: trainer.limit_train_batches), FEWER),
    TrainerOption("limit_val_batches", _unless(1.0, of=lambda trainer: trainer.limit_val_batches), HELD_OUT),
    TrainerOption("val_check_interval", lambda trainer: _val_check_interval(trainer), HELD_OUT),
    TrainerOption(
        "check_val_every_n_epoch", _unless(1, None, of=lambda trainer: trainer.check_val_every_n_epoch), HELD_OUT
    ),
    TrainerOption(
        "num_sanity_val_steps",
        _unless(0, 2, of=lambda trainer: trainer.num_sanity_val_steps),  # 2 is the trainer's default
        HELD_OUT,
    ),
    TrainerOption(
        "use_distributed_sampler",
        _unless(True, of=lambda trainer: trainer._accelerator_connector.use_distributed_sampler),
        "no process shares its batches with another; leave it out",
    ),
)
"""Refused by the scopes that go through the model window by window."""

NO_ACCUMULATION = (
    TrainerOption(
        "accumulate_grad_batches",
        _unless(1, of=lambda trainer: trainer.accumulate_grad_batches),
        "each step has all the data, in Gram matrices; leave it out",
    ),
)
"""Refused where a step sees all the data."""

NO_OPTIMIZER = (
    TrainerOption(
        "gradient_clip_val",
        _unless(None, 0, 0.0, of=lambda trainer: trainer.gradient_clip_val),
        "its solver follows no gradients; leave it out, or choose model.solver: GradientDescent",
    ),
)
"""Refused where nothing follows a gradient."""


def _clip_algorithm(trainer: Any) -> str | None:
    return None if trainer.gradient_clip_algorithm is None else trainer.gradient_clip_algorithm.value


def _val_check_interval(trainer: Any) -> Any:
    if trainer._val_check_time_interval is not None:
        return f"{trainer._val_check_time_interval} seconds"
    is_usual = isinstance(trainer.val_check_interval, float) and trainer.val_check_interval == 1.0
    return None if is_usual else trainer.val_check_interval
