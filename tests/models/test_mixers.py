"""Token mixers, found by what they do: in hybrids, in state-space models, without numbers."""

import pytest
import torch
from torch import nn

from recon.models.anatomy import Anatomy
from recon.models.mixers import examine
from recon.models.replay import Replay
from recon.models.synthetic import numbers_like, ones_like
from recon.models.windows import submodule_windows
from recon.planner.fake.model import FakeModel
from tests.families.small import small_config, small_model
from tests.support.families import DEPTH, tiny, token_ids

# Model type -> mixer and kind of each of four blocks: read off the transformers sources by hand.
MIXED = {
    "lfm2": [("conv", "mixer"), ("conv", "mixer"), ("self_attn", "attention"), ("conv", "mixer")],
    "qwen3_5_text": [*[("linear_attn", "mixer")] * 3, ("self_attn", "attention")],
    "bamba": [("mamba", "mixer"), ("self_attn", "attention")] * 2,
    "rwkv": [("attention", "attention")] * 4,  # its feed-forward mixes tokens, too, and reads the first mixer
    "xlstm": [("mlstm_layer", "mixer")] * 4,
    "openai-gpt": [("attn", "attention")] * 4,  # returns lists
    "mamba": [None] * 4,  # a norm and a mixer
    "falcon_h1": [None] * 4,  # attention and a state-space mixer side by side
}


@pytest.mark.parametrize("family", MIXED)
@torch.no_grad()
def test_windows_of_blocks_with_other_mixers_compose_to_the_model_exactly(family: str) -> None:
    model = small_model(small_config(family))
    replay = Replay(model, Anatomy.of(model))
    names = []
    hidden = replay.embed(token_ids())
    for block, mixed in zip(replay.anatomy.blocks, MIXED[family], strict=True):
        outputs: list[torch.Tensor] = []
        handle = block.module.register_forward_hook(
            lambda module, args, out, kept=outputs: kept.append(out[0] if isinstance(out, (tuple, list)) else out)
        )
        model(input_ids=token_ids(), use_cache=False)
        handle.remove()
        if mixed is None:
            assert block.mixer is None
            names.append(f"{block.index:03d}")
        else:
            assert block.mixer_name == f"{block.name}.{mixed[0]}"
            stubbed = replay.stub(block.index, hidden, replay.tap(block.index, hidden))
            torch.testing.assert_close(stubbed, outputs[0])
            names += [f"{block.index:03d}.{mixed[1]}", f"{block.index:03d}.mlp"]
        hidden = replay.run(block.index, hidden)
        torch.testing.assert_close(hidden, outputs[0])
    windows = submodule_windows(replay)
    assert [window.name for window in windows] == names == sorted(names)
    for block in replay.anatomy.blocks:
        of_block = [window for window in windows if window.blocks == [block]]
        owned = [name for window in of_block for name in window.owned] + of_block[0].shared
        assert sorted(owned) == sorted(block.parameters())


@pytest.mark.parametrize("family", ["lfm2", "mamba", "falcon_h1", "qwen3_5_text"])
def test_a_plan_reads_the_same_anatomy_without_numbers(family: str) -> None:
    config = small_config(family)
    real, fake = Anatomy.of(small_model(config)).blocks, FakeModel(config, torch.bfloat16).anatomy.blocks
    assert [(one.mixer_name, one.kind) for one in real] == [(one.mixer_name, one.kind) for one in fake]
    assert [list(one.matrices) for one in real] == [list(one.matrices) for one in fake]


def test_kernels_states_and_maps_that_are_not_called_are_left_dense() -> None:
    block = Anatomy.of(small_model(small_config("mamba"))).blocks[0]
    shapes = {"mixer.A_log": [64, 8], "mixer.conv1d.weight": [64, 1, 4], "mixer.dt_proj.weight": [64, 8]}
    assert block.left_dense() == shapes
    assert [name.rpartition(".")[2] for name in block.matrices] == ["in_proj", "x_proj", "out_proj"]


def test_the_mixer_is_found_whatever_the_weights_are() -> None:
    model = tiny("llama").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert [block.mixer_name for block in Anatomy.of(model).blocks] == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_an_experiment_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = tiny("llama", attn_implementation="sdpa").train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    Anatomy.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_blocks_of_equal_modules_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    blocks = list(model.model.layers)
    calls = []
    forward = type(blocks[0]).forward
    monkeypatch.setattr(type(blocks[0]), "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    first = examine(model, [str(index) for index in range(DEPTH)], blocks)
    assert len(calls) == 2  # with the first token as it is; the call with its forward replaced is not counted
    assert examine(model, [str(index) for index in range(DEPTH)], blocks) == first
    assert len(calls) == 2


def test_a_model_that_cannot_be_run_is_refused_with_its_own_error() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = nn.CosineSimilarity()
    with pytest.raises(ValueError, match=r"run on 7 tokens .*LlamaForCausalLM raised TypeError: .*x2"):
        Anatomy.of(model)


def test_numbers_of_any_size_take_no_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    large = numbers_like(torch.empty(64, 200_000, 50_000, device="meta", dtype=torch.bfloat16), generator)
    assert large.shape == (64, 200_000, 50_000)
    assert large.untyped_storage().nbytes() < 2**21
    assert ones_like(torch.empty(10**6, 10**6, device="meta")).untyped_storage().nbytes() == 4
    assert ones_like(torch.empty(3, dtype=torch.int64)).tolist() == [0, 0, 0]
