"""`--optimizer` and `--lr_scheduler`: LightningCLI's, in full retraining."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from recon.cli import main
from recon.cli.fit import _cli
from recon.scopes import FullRetraining
from recon.scopes.optimization import LRSchedulerRecipe, OptimizerRecipe
from tests.support.scope_fixtures import IGNORED, prepared, same, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]


def trained(tmp_path: Path, *recipes: Any) -> tuple[dict[str, torch.Tensor], L.Trainer, FullRetraining]:
    scope = FullRetraining(name=save_tiny("llama", tmp_path), epochs=2, lr=1e-2)
    if recipes:
        scope.choose_optimizer(*recipes)
    trainer = trainer_of()
    trainer.fit(prepared(scope))
    assert scope.masks.violations(scope.model) == 0
    return weights_of(scope.model), trainer, scope


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 1e-3}),
        (torch.optim.RMSprop, {"lr": 1e-3}),
    ],
)
def test_a_chosen_optimizer_trains_by_its_own_options_and_keeps_zeros(kind: Any, options: Any, tmp_path: Path) -> None:
    weights, trainer, scope = trained(tmp_path, OptimizerRecipe(kind, options), None)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is kind
    assert optimizer.defaults.items() >= options.items()
    assert scope.lr == options["lr"]  # what hyperparameters say
    assert not same(weights, trained(tmp_path)[0])


def test_the_default_written_out_changes_no_bit(tmp_path: Path) -> None:
    written = OptimizerRecipe(torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.0})
    assert same(trained(tmp_path, written, None)[0], trained(tmp_path)[0])


def test_a_chosen_schedule_steps_by_epochs(tmp_path: Path) -> None:
    halving = LRSchedulerRecipe(torch.optim.lr_scheduler.ExponentialLR, {"gamma": 0.5})
    _, trainer, _ = trained(tmp_path, None, halving)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.5**2  # after two epochs


COMMAND = ["-c", "scopes/full", "--model.epochs=1", "--run_dir"]


def test_the_command_hands_them_on(tmp_path: Path) -> None:
    options = ["--optimizer=SGD", "--optimizer.lr=0.3", "--optimizer.momentum=0.5"]
    schedule = ["--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--lr_scheduler.monitor=held_out_loss"]
    cli = _cli([*COMMAND, str(tmp_path), *options, *schedule])
    optimizer = cli.model._optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.3, 0.5)
    described = cli.model._lr_scheduler(optimizer)
    assert isinstance(described["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert described["monitor"] == "held_out_loss"
    assert cli.fingerprint["options"]["optimizer"]["class_path"] == "torch.optim.SGD"
    plain = _cli([*COMMAND, str(tmp_path)])
    assert (plain.model._optimizer, plain.model._lr_scheduler) == (None, None)
    assert not {"optimizer", "lr_scheduler"} & plain.fingerprint["options"].keys()  # runs of before go on


@pytest.mark.parametrize(
    ("scope", "options", "match"),
    [
        ("full", ["--optimizer=Muon"], "masks need an optimizer that keeps zeros at zero (SGD, "),
        ("full", ["--optimizer=Muon"], "got Muon"),
        ("submodule", ["--optimizer=SGD"], "are for full retraining, got SGD with the submodule scope"),
        ("block", ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"], "got StepLR with the block scope"),
        ("matrix", ["--optimizer=AdamW"], "got AdamW with the matrix scope"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_once(
    scope: str, options: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(["fit", "-c", f"scopes/{scope}", "--run_dir", str(run_dir), *options]) == 2
    assert match in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_run_by_another_optimizer_from_a_yaml(tmp_path: Path) -> None:
    shape = {
        "model_type": "llama", "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    (tmp_path / "sgd.yaml").write_text(
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}\n"
        "lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 2}}\n"
    )
    small = ["--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"]
    model = ["--model.name=random", f"--model.shape={json.dumps(shape)}", "--model.epochs=2", "--drift=false"]
    args = ["fit", "-c", "scopes/full", "-c", str(tmp_path / "sgd.yaml"), *small, *model, "--summary=false"]
    assert main([*args, "--run_dir", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["mask_violations"] == 0
