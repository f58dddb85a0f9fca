"""Masked LoRA: the same numbers as dense products with the masked update, before and after it is merged."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from callbacks.flops import flops_per_token
from callbacks.mask_enforcer import MaskEnforcer
from recon.cli import main
from recon.experiment.checkpoints import Checkpoints, last
from recon.models.anatomy import Anatomy
from recon.profiling.footprint import footprint
from recon.pruning.masks import Masks
from recon.scopes import FullRetraining
from recon.scopes.lora import DEFAULT_LORA, Lora, attach, is_adapted, merge, merge_state
from tests.support import distributed_runs as runs
from tests.support.families import tiny, token_ids
from tests.support.processes import in_processes
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    random_masks,
    same,
    save_tiny,
    trainer_of,
    weights_of,
)
from tests.support.slow import quick

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

FAMILIES = ("llama", "gpt2", "phi")
LORA = Lora(rank=4, alpha=6.0)
STRATEGIES = ("ddp", "zero1", "zero3", "fsdp2")
LEARN_LORA = ("--model.parameters", "lora", "--model.lora.rank", "4")


def pruned(family: str, **overrides: Any) -> tuple[PreTrainedModel, Masks]:
    model = tiny(family, **overrides).requires_grad_(False)
    masks = random_masks(model)
    masks.apply(model)
    return model, masks


def adapted(family: str, lora: Lora = LORA) -> tuple[PreTrainedModel, Masks, list[str]]:
    """A pruned model with adapters that have learned something."""
    model, masks = pruned(family)
    names = attach(model, masks, masks, lora, seed=0)
    with torch.no_grad():
        for index, name in enumerate(names):
            generator = torch.Generator().manual_seed(index)
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, masks, names


def dense_with_update(family: str, model: PreTrainedModel, masks: Masks, lora: Lora) -> PreTrainedModel:
    """The obvious version: a plain model whose weights are W + (alpha / r) (B A) * mask, entry by entry."""
    plain, _ = pruned(family)
    with torch.no_grad():
        for name, keep in masks.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            a, b = module.get_parameter("lora_A"), module.get_parameter("lora_B")
            update = torch.einsum("or,ri->io" if isinstance(module, Conv1D) else "or,ri->oi", b, a)
            plain.get_parameter(name).add_(lora.alpha / lora.rank * update * keep.float())
    return plain


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_no_output_and_have_the_documented_shapes(family: str) -> None:
    model, masks = pruned(family)
    expected = logits(model)
    names = attach(model, masks, masks, DEFAULT_LORA, seed=0)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert set(names) == {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name.rpartition(".")[0] + ".weight" for name in names} == set(masks)
    for block in Anatomy.of(model).blocks:
        for matrix in block.matrices.values():
            module = matrix.module
            shape = module.get_parameter("weight").shape
            out, in_ = shape if isinstance(module, nn.Linear) else reversed(shape)
            a, b = module.get_parameter("lora_A"), module.get_parameter("lora_B")
            assert (a.shape, b.shape) == ((16, in_), (out, 16))
            assert not b.any()
            assert 0.8 / math.sqrt(in_) < a.abs().max() <= 1 / math.sqrt(in_)


def test_adapters_start_by_seed_and_name_alone() -> None:
    (one, masks), (other, _), (third, _) = (pruned("llama") for _ in range(3))
    attach(one, masks, masks, LORA, seed=0)
    some = list(masks)[3:5]
    names = attach(other, masks, [*some, "model.norm.weight"], LORA, seed=0)  # the norm has no mask: no adapter
    assert names == [name.replace("weight", adapter) for name in some for adapter in ("lora_A", "lora_B")]
    attach(third, masks, masks, LORA, seed=1)
    for name in names[::2]:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), third.get_parameter(name))
    assert not torch.equal(*(one.get_parameter(f"model.layers.{depth}.mlp.up_proj.lora_A") for depth in (0, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients_are_those_of_the_obvious_computation(family: str) -> None:
    model, masks, names = adapted(family)
    plain = dense_with_update(family, model, masks, LORA).requires_grad_(True)
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    expected.square().mean().backward()
    logits(model).square().mean().backward()
    scale = LORA.alpha / LORA.rank
    for name, keep in masks.items():  # by hand from the gradient of the whole weight
        module = model.get_submodule(name.removesuffix(".weight"))
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        whole = gradient * keep
        whole = whole.T if isinstance(module, Conv1D) else whole
        a, b = module.get_parameter("lora_A"), module.get_parameter("lora_B")
        torch.testing.assert_close(b.grad, scale * whole @ a.detach().T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.grad, scale * b.detach().T @ whole, rtol=1e-4, atol=1e-6)
    assert {name for name, one in model.named_parameters() if one.grad is not None} == set(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_computes_as_attached_and_is_as_before_otherwise(family: str) -> None:
    model, masks, names = adapted(family)
    expected, plain = logits(model), dense_with_update(family, model, masks, LORA)
    twin = copy.deepcopy(model)
    merge(model, names)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    before, _ = pruned(family)
    assert weights_of(model).keys() == weights_of(before).keys()
    assert not any("forward" in vars(module) for module in model.modules())
    for name, keep in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight == 0, ~keep)
        torch.testing.assert_close(weight.detach(), plain.get_parameter(name), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(twin), expected, rtol=0, atol=0)  # a copy has its own adapters
    state = twin.state_dict()
    merge_state(twin, names, state)
    assert same({name: state[name] for name in weights_of(model)}, weights_of(model))
    assert state.keys() == twin.state_dict().keys() == model.state_dict().keys()


def test_some_of_the_adapters_can_be_merged() -> None:
    model, _, names = adapted("llama")
    expected = logits(model)
    first = [name for name in names if name.startswith("model.layers.0.")]
    merge(model, first)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert [name for name, _ in model.named_parameters() if "lora" in name] == names[len(first) :]


def test_bf16_weights_compute_as_they_will_be_merged() -> None:
    model, masks = pruned("llama")
    model.bfloat16()
    names = attach(model, masks, masks, LORA, seed=0)
    with torch.no_grad():
        for name in names[1::2]:
            model.get_parameter(name).normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert {model.get_parameter(name).dtype for name in names} == {torch.float32}
    before = logits(model)
    merge(model, names)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), before)
    assert masks.violations(model) == 0


def test_autocast_reaches_the_adapters() -> None:
    model, _, names = adapted("gpt2")
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = logits(model)
        output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert 0 < (output - expected).norm() / expected.norm() < 0.02
    gradients = [model.get_parameter(name).grad for name in names]
    assert all(one is not None and one.dtype == torch.float32 and one.any() for one in gradients)


def test_what_has_no_mask_or_computes_otherwise_is_refused() -> None:
    model, masks = pruned("llama")
    with pytest.raises(ValueError, match="learns updates of pruned matrices, got none; give a criterion"):
        attach(model, masks, ["model.norm.weight"], LORA, seed=0)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.model.layers[1].mlp.up_proj = Doubled(32, 64, bias=False)
    with pytest.raises(ValueError, match=r"got Doubled with a forward of its own at model\.layers\.1\.mlp\.up_proj"):
        attach(model, masks, masks, LORA, seed=0)
    wrongs: tuple[dict[str, Any], ...] = ({"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf})
    for wrong in wrongs:
        with pytest.raises(ValueError, match="needs a rank of at least 1 and a positive alpha"):
            Lora(**wrong)


class Gradients(Callback):
    """The names of parameters that had a gradient at any step."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.names |= {name for name, one in pl_module.model.named_parameters() if one.grad is not None}


class HeldOut(Callback):
    """The held-out loss after each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["held_out_loss"]))


@pytest.mark.parametrize(
    ("family", "options", "trainer"),
    [
        ("llama", {}, {}),
        ("gpt2", {"loss": "distillation"}, {"precision": "bf16-mixed"}),
        ("phi", {"gradient_checkpointing": True}, {}),
    ],
)
def test_full_retraining_with_lora(family: str, options: dict, trainer: dict, tmp_path: Path) -> None:
    scope = FullRetraining(
        name=save_tiny(family, tmp_path), epochs=4, parameters="lora", lora=Lora(rank=4, alpha=8.0), lr=1e-2, **options
    )
    gradients, held_out = Gradients(), HeldOut()
    data = data_of(num=32, validation=8)
    start = weights_of(prepared(scope, data).model)
    trainer_of(MaskEnforcer(), gradients, held_out, **trainer).fit(scope)
    assert gradients.names == {name for name in start if "lora" in name}
    assert len(held_out.losses) == 4
    assert held_out.losses[-1] < held_out.losses[0]
    recovered = weights_of(scope.model)
    assert set(recovered) == {name for name in start if "lora" not in name}
    moved = {name for name, weight in recovered.items() if not torch.equal(weight, start[name])}
    assert moved == set(scope.masks)
    assert all(torch.equal(recovered[name] == 0, ~keep) for name, keep in scope.masks.items())
    assert scope.label == f"full ({'distillation, ' if options.get('loss') else ''}lora)"


def test_lora_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learns updates of pruned matrices, got none"):
        prepared(FullRetraining(name=save_tiny("llama", tmp_path), parameters="lora"), masks=Masks({}))


class Fail(Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("the test says stop")


def test_a_run_that_failed_goes_on_bit_identically(tmp_path: Path) -> None:
    def scope() -> FullRetraining:
        return prepared(FullRetraining(name=save_tiny("llama", tmp_path), epochs=2, parameters="lora", lr=1e-2))

    uninterrupted, resumed, directory = scope(), scope(), tmp_path / "checkpoints"
    trainer_of(MaskEnforcer()).fit(uninterrupted)
    with pytest.raises(RuntimeError, match="the test says stop"):
        trainer_of(MaskEnforcer(), Fail(), Checkpoints(directory), enable_checkpointing=True).fit(scope())
    path = last(directory)
    assert path is not None
    assert path.name == "step-000004.ckpt"
    trainer = trainer_of(MaskEnforcer(), Checkpoints(directory), enable_checkpointing=True)
    trainer.fit(resumed, ckpt_path=path, weights_only=True)
    assert same(weights_of(uninterrupted.model), weights_of(resumed.model))


def test_flops_and_footprint_know_the_adapters() -> None:
    model, masks = pruned("llama")
    frozen = flops_per_token(model, 16)
    learning = tiny("llama").requires_grad_(False)
    for name in masks:
        learning.get_parameter(name).requires_grad_(True)
    names = attach(model, masks, masks, LORA, seed=0)
    assert (
        flops_per_token(model, 16) == flops_per_token(learning, 16) > frozen
    )  # A and B learn by the weight's gradient
    adapters = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(adapters)
    logits(model).square().mean().backward()
    optimizer.step()
    measured, size = footprint(model, [optimizer]), 4 * sum(one.numel() for one in adapters)
    assert measured.gradients == size
    assert measured.optimizer == 2 * size + 4 * len(adapters)  # AdamW's step count is a tensor of its own
    assert any(is_adapted(module) for module in model.modules())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the masks of the distributed runs, and what one process makes of them."""
    directory = tmp_path_factory.mktemp("lora")
    in_processes(runs.prune_model, directory / "masks", world=1)
    in_processes(runs.fit, "auto", "32-true", 1, directory / "one" / "32-true", *LEARN_LORA, world=1)
    return directory


@pytest.mark.parametrize("strategy", quick(STRATEGIES))
def test_two_processes_learn_the_adapters_of_one(strategy: str, shared: Path, capsys: Any) -> None:
    run = shared / strategy / "32-true"
    in_processes(runs.fit_keeping_checkpoint, strategy, "32-true", 2, run, *LEARN_LORA)
    one, two = runs.weights(shared / "one" / "32-true"), runs.weights(run)
    assert runs.difference(one, two) < 1e-6
    assert runs.largest_pruned(run) == 0
    before = load_file(shared / "masks" / "source" / "model.safetensors")
    masks = Masks.load(run / "masks.safetensors")
    assert all(torch.equal(two[name], weight) for name, weight in before.items() if name not in masks)
    assert all((two[name] - before[name])[keep].norm() > 1e-3 for name, keep in masks.items())
    assert main(["consolidate", str(run)]) == 0
    assert runs.same(load_file(run / "model-step-000008" / "model.safetensors"), two)
