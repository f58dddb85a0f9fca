"""Full retraining in one process: what its options change, and what they do not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.mask_enforcer import MaskEnforcer
from recon.data.loader import ResumableLoader
from recon.models.anatomy import Anatomy
from recon.scopes import FullRetraining, SubmoduleDistillation
from recon.scopes.enforcement import _require_zero_keeping
from tests.support.scope_fixtures import IGNORED, data_of, prepared, same, save_tiny, trainer_of, weights_of

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]


class CountForwards(Callback):
    """How often the first block's attention ran during training steps."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        attention = Anatomy.of(pl_module.model).blocks[0].mixer
        attention.register_forward_hook(lambda *_: setattr(self, "count", self.count + pl_module.trainer.training))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(family: str, tmp_path: Path) -> None:
    weights, counts = [], []
    for checkpointing in (False, True):
        counter = CountForwards()
        scope = FullRetraining(name=save_tiny(family, tmp_path), epochs=2, gradient_checkpointing=checkpointing)
        trainer_of(MaskEnforcer(), counter).fit(prepared(scope))
        weights.append(weights_of(scope.model))
        counts.append(counter.count)
    assert counts[1] == 2 * counts[0] > 0
    assert same(*weights)


@pytest.mark.parametrize(("train", "moves"), [("blocks", False), ("all", True)])
def test_embeddings_and_head_learn_only_if_asked(train: Any, moves: bool, tmp_path: Path) -> None:
    scope = prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=1, train=train))
    dense = weights_of(scope.model)
    trainer_of(MaskEnforcer()).fit(scope)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(scope.model.get_parameter(name), dense[name]) != moves


def test_an_optimizer_inside_deepspeeds_is_judged() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    _require_zero_keeping([SimpleNamespace(optimizer=torch.optim.AdamW([weight]))])
    inside = SimpleNamespace(optimizer=SimpleNamespace(optimizer=torch.optim.Muon([weight])))
    with pytest.raises(ValueError, match=r"keeps zeros at zero .*, got Muon$"):
        _require_zero_keeping([inside])


def test_a_local_scope_takes_one_process_and_partitions_need_zero3(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    two = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="submodule scope runs in one process"):
        SubmoduleDistillation(name=name).require_strategy(two)
    FullRetraining(name=name).require_strategy(two)
    with pytest.raises(ValueError, match="needs a strategy that loads weights in parts"):
        FullRetraining(name=name, partitioned=True).require_strategy(trainer_of())


def test_a_loader_goes_on_after_the_batch_it_was_at() -> None:
    loader = data_of(num=10, batch_size=4).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    whole = [batch["input_ids"] for batch in loader]
    assert loader.state_dict() == {"given": 3}
    iterator = iter(loader)
    next(iterator)
    resumed = data_of(num=10, batch_size=4).train_dataloader()
    assert isinstance(resumed, ResumableLoader)
    resumed.load_state_dict(loader.state_dict())
    rest = [batch["input_ids"] for batch in resumed]
    assert [torch.equal(one, other) for one, other in zip(rest, whole[1:], strict=True)] == [True, True]
    assert resumed.state_dict() == {"given": 3}
    assert len(list(resumed)) == 3  # only the first epoch is entered midway
    resumed.load_state_dict({"given": 3})
    assert len(list(resumed)) == 3  # at an epoch's end nothing of the next is left out
