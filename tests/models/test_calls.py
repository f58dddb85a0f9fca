"""What blocks are called with, what is computed of them, and what a failure leaves behind."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.models.calls import Call
from recon.models.replay import Replay
from recon.models.windows import (
    submodule_windows,
)
from tests.support.families import DEPTH, DIM, tiny, token_ids
from tests.support.replays import all_windows, replay_of, states_in


def test_analysis_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    model.get_input_embeddings().eval()
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.ones_like(parameter) if number % 4 == 0 else None
    gradients = [parameter.grad for parameter in parameters]
    modes = [module.training for module in model.modules()]
    keys = [set(vars(module)) for module in model.modules()]
    rng = torch.get_rng_state()
    replay = replay_of(model)
    all_windows(replay)
    replay.stub(1, replay.embed(token_ids()), torch.zeros(2, 12, DIM))
    assert torch.equal(rng, torch.get_rng_state())
    assert [parameter.requires_grad for parameter in parameters] == [n % 2 == 0 for n in range(len(parameters))]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or (gradient == 1).all()
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_even_in_training_mode() -> None:
    model = tiny("opt", dropout=0.5, layerdrop=0.5)
    expected = states_in(model, token_ids())[0]
    model.train()
    replay = replay_of(model)
    hidden = replay.embed(token_ids())
    for index in range(DEPTH):
        hidden = replay.run(index, hidden)
        assert torch.equal(hidden, expected[index])


def test_forwards_and_flags_are_restored_when_a_block_fails(broken_mlp: Replay) -> None:
    block = broken_mlp.anatomy.blocks[0]
    frozen = broken_mlp.model.requires_grad_(False)

    def shadow(*args, **kwargs):  # what accelerate's hooks leave on a module
        return type(block.mixer).forward(block.mixer, *args, **kwargs)

    block.mixer.forward = shadow
    hidden = broken_mlp.embed(token_ids())
    with pytest.raises(ZeroDivisionError):
        broken_mlp.stub(0, hidden, hidden)
    with pytest.raises(ZeroDivisionError):
        submodule_windows(broken_mlp)
    assert block.mixer.forward is shadow
    assert "forward" not in vars(block.module)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_nothing_after_the_tap_is_computed(broken_mlp: Replay) -> None:
    assert broken_mlp.tap(0, broken_mlp.embed(token_ids())).shape == (2, 12, DIM)


def test_recording_computes_no_block_and_no_head(llama: Replay) -> None:
    modules = [llama.model.lm_head, *(block.mixer for block in llama.anatomy.blocks[1:])]
    handles = [module.register_forward_pre_hook(lambda *_: 1 / 0) for module in modules]
    llama.run(0, llama.embed(token_ids()))
    for handle in handles:
        handle.remove()


def test_calls_recorded_in_inference_mode_serve_training() -> None:
    replay = replay_of(tiny("llama"))  # its rotary embeddings are saved for the backward pass
    with torch.inference_mode():
        replay.run(0, replay.embed(token_ids()))
    replay.run(0, replay.embed(token_ids()).detach()).sum().backward()


def test_calls_follow_a_block_to_another_device(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    replay.anatomy.blocks[1].module.to("meta")
    hidden = replay.embed(token_ids())
    assert replay.run(0, hidden).device.type == "cpu"
    assert replay.run(1, hidden.to("meta")).shape == hidden.shape


@torch.no_grad()
def test_calls_follow_the_precision_of_the_model(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    replay.run(0, replay.embed(token_ids()))
    model.to(torch.bfloat16)
    hidden = replay.embed(token_ids())
    assert torch.equal(replay.run(0, hidden), states_in(model, token_ids())[0][0])


def test_gradients_flow_under_autocast_when_all_analysis_happens_inside(model: PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        replay = replay_of(model)
        window = submodule_windows(replay)[1]
        hidden = replay.embed(token_ids()).detach()
        window.forward(replay, hidden, hidden).float().sum().backward()
    gradients = dict(model.named_parameters())
    assert all(gradients[name].grad is not None for name in window.owned)


def test_hidden_states_may_come_by_keyword(llama: Replay) -> None:
    hidden = llama.embed(token_ids())
    call, entering = Call.split("h.0", (), {"hidden_states": hidden, "mask": None})
    assert entering is hidden
    assert call.kwargs == {"mask": None}
    assert call.run(Echo(), hidden) is hidden


class Echo(torch.nn.Module):
    def forward(self, *, hidden_states: Tensor, mask: None) -> Tensor:
        return hidden_states
