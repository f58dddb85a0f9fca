from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from families import DEPTH, DIM, FAMILIES, tiny, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from recon.anatomy import Anatomy
from recon.calls import Call, Form, record_calls
from recon.replay import Replay
from recon.windows import AttentionWindow, BlockWindow, MLPWindow, Window, block_windows, submodule_windows

PARALLEL = {"cohere", "phi", "gptj", "falcon"}  # attention and MLP read the same normalised input


def replay_of(model: PreTrainedModel) -> Replay:
    return Replay(model, Anatomy.of(model))


def states_in(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Block outputs and attention outputs of a plain forward pass, by hooks that know nothing of recon."""
    outputs: dict[str, list[Tensor]] = {"block": [], "attention": []}

    def keep(kind: str):
        return lambda module, args, out: outputs[kind].append(out[0] if isinstance(out, tuple) else out)

    handles = []
    for block in Anatomy.of(model).blocks:
        handles.append(block.module.register_forward_hook(keep("block")))
        handles.append(block.attention.register_forward_hook(keep("attention")))
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs["block"], outputs["attention"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def llama() -> Replay:
    return replay_of(tiny("llama"))


@torch.no_grad()
def test_windows_compose_to_the_model_exactly(model: PreTrainedModel) -> None:
    tokens = token_ids()
    blocks, attentions = states_in(model, tokens)
    replay = replay_of(model)
    hidden = replay.embed(tokens)
    for index in range(DEPTH):
        tapped = replay.tap(index, hidden)
        stubbed = replay.stub(index, hidden, tapped)
        both = replay.run_and_tap(index, hidden)
        hidden = replay.run(index, hidden)
        assert torch.equal(hidden, blocks[index])
        assert torch.equal(tapped, attentions[index])
        assert torch.equal(stubbed, hidden)
        assert torch.equal(both[0], tapped)
        assert torch.equal(both[1], hidden)


@torch.no_grad()
def test_one_replay_serves_several_shapes_and_keeps_two(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    for batch, seq in [(1, 12), (3, 12), (2, 5), (1, 12)]:
        tokens = token_ids(batch, seq)
        hidden = replay.embed(tokens)
        for index, expected in enumerate(states_in(model, tokens)[0]):
            hidden = replay.run(index, hidden)
            assert torch.equal(hidden, expected)
    assert len(replay._calls) == 2


@torch.no_grad()
def test_windows_compose_exactly_under_autocast(model: PreTrainedModel) -> None:
    tokens = token_ids()
    replay = replay_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks, _ = states_in(model, tokens)
        hidden = replay.embed(tokens)
        for index in range(DEPTH):
            stubbed = replay.stub(index, hidden, replay.tap(index, hidden))
            hidden = replay.run(index, hidden)
            assert torch.equal(hidden, blocks[index])
            assert torch.equal(stubbed, hidden)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
@torch.no_grad()
def test_windows_compose_exactly_with_eager_attention_in_bfloat16(family: str) -> None:
    model = tiny(family, attn_implementation="eager").to(torch.bfloat16)
    replay = replay_of(model)
    hidden = replay.embed(token_ids())
    for index, expected in enumerate(states_in(model, token_ids())[0]):
        assert torch.equal(replay.stub(index, hidden, replay.tap(index, hidden)), expected)
        hidden = replay.run(index, hidden)
        assert torch.equal(hidden, expected)


def test_submodule_windows_cover_every_block_parameter_once(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    windows = submodule_windows(replay)
    assert [window.name for window in windows] == [f"{i:03d}.{k}" for i in range(3) for k in ("attention", "mlp")]
    assert [window.name for window in windows] == sorted(window.name for window in windows)
    for block, attention, mlp in zip(replay.anatomy.blocks, windows[::2], windows[1::2], strict=True):
        assert isinstance(attention, AttentionWindow)
        assert isinstance(mlp, MLPWindow)
        assert attention.indices == mlp.indices == [block.index]
        assert attention.shared == mlp.shared
        assert sorted(attention.owned + mlp.owned + mlp.shared) == sorted(block.parameters())
        assert bool(mlp.shared) == (model.config.model_type in PARALLEL)
        for name in block.matrices:  # matrices go where the module tree says
            owner = attention if name.startswith(block.attention_name) else mlp
            assert f"{name}.weight" in owner.owned


def test_block_windows_of_two_over_three_blocks() -> None:
    anatomy = Anatomy.of(tiny("llama"))
    windows = block_windows(anatomy, 2)
    assert [(window.name, window.indices) for window in windows] == [("000-001", [0, 1]), ("002", [2])]
    owned = [name for window in windows for name in window.owned]
    assert sorted(owned) == sorted(name for block in anatomy.blocks for name in block.parameters())
    assert all(window.shared == [] for window in windows)


def test_block_windows_at_the_limits() -> None:
    anatomy = Anatomy.of(tiny("llama"))
    assert [window.indices for window in block_windows(anatomy, 1)] == [[0], [1], [2]]
    assert [window.indices for window in block_windows(anatomy, 7)] == [[0, 1, 2]]
    with pytest.raises(ValueError, match="at least one block, got size 0"):
        block_windows(anatomy, 0)


def all_windows(replay: Replay) -> list[Window]:
    return [*submodule_windows(replay), *block_windows(replay.anatomy, 2)]


def test_one_step_changes_what_the_window_owns_and_nothing_else(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    hidden = replay.embed(token_ids()).detach()
    attention = torch.randn(2, 12, DIM, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    for window in all_windows(replay):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in window.owned)
        optimizer = torch.optim.SGD([parameters[name] for name in window.owned], lr=1.0)
        output = window.forward(replay, hidden, attention)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        (output * weights).square().sum().backward()
        assert all(parameters[name].grad is not None for name in window.owned)
        optimizer.step()
        changed = {name for name, old in before.items() if not torch.equal(parameters[name], old)}
        still = set(window.owned) - changed
        assert changed <= set(window.owned)
        assert not {name for name in still if parameters[name].grad.any()}
        model.zero_grad()
        with torch.no_grad():
            for name, old in before.items():
                parameters[name].copy_(old)


def test_block_window_is_its_blocks_in_a_row(llama: Replay) -> None:
    hidden = llama.embed(token_ids())
    window = block_windows(llama.anatomy, 2)[0]
    assert isinstance(window, BlockWindow)
    assert torch.equal(window.forward(llama, hidden), llama.run(1, llama.run(0, hidden)))


def test_mlp_window_asks_for_the_attention_output(llama: Replay) -> None:
    window = submodule_windows(llama)[1]
    with pytest.raises(ValueError, match=r"000\.mlp needs the output of model\.layers\.0\.self_attn as `atten"):
        window.forward(llama, llama.embed(token_ids()))


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


@pytest.fixture
def broken_mlp(llama: Replay) -> Iterator[Replay]:
    handle = llama.model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    yield llama
    handle.remove()


def test_forwards_and_flags_are_restored_when_a_block_fails(broken_mlp: Replay) -> None:
    block = broken_mlp.anatomy.blocks[0]
    frozen = broken_mlp.model.requires_grad_(False)

    def shadow(*args, **kwargs):  # what accelerate's hooks leave on a module
        return type(block.attention).forward(block.attention, *args, **kwargs)

    block.attention.forward = shadow
    hidden = broken_mlp.embed(token_ids())
    with pytest.raises(ZeroDivisionError):
        broken_mlp.stub(0, hidden, hidden)
    with pytest.raises(ZeroDivisionError):
        submodule_windows(broken_mlp)
    assert block.attention.forward is shadow
    assert "forward" not in vars(block.module)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_nothing_after_the_tap_is_computed(broken_mlp: Replay) -> None:
    assert broken_mlp.tap(0, broken_mlp.embed(token_ids())).shape == (2, 12, DIM)


def test_recording_computes_no_block_and_no_head(llama: Replay) -> None:
    modules = [llama.model.lm_head, *(block.attention for block in llama.anatomy.blocks[1:])]
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


def test_arguments_that_depend_on_the_tokens_are_refused() -> None:
    model = tiny("gemma4_text", head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96)
    with pytest.raises(ValueError, match=r"A replayed block must.*model\.layers\.0 differs by"):
        replay_of(model)


def test_an_attention_that_returns_more_than_its_output_is_refused() -> None:
    experts = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": DIM}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    sizes = {"d_model": DIM, "n_layers": DEPTH, "n_heads": 4}
    model = tiny("dbrx", **sizes, attn_config=attention, ffn_config=experts)
    with pytest.raises(ValueError, match=r"blocks\.0 needs more than the first output of .*norm_attn_norm"):
        replay_of(model)


def test_blocks_that_run_twice_are_refused() -> None:
    model = tiny("llama")
    no_rotation = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    model.model.norm.register_forward_pre_hook(
        lambda module, args: model.model.layers[0](args[0], position_embeddings=no_rotation)
    )
    with pytest.raises(ValueError, match=r"call each block once, model\.layers\.0 was called 2 times"):
        replay_of(model)


def test_an_attention_that_its_block_does_not_call_is_refused() -> None:
    model = tiny("llama")
    block = model.model.layers[0]
    block.forward = lambda hidden_states, **kwargs: block.mlp(hidden_states)
    with pytest.raises(ValueError, match=r"model\.layers\.0 called model\.layers\.0\.self_attn 0 times"):
        replay_of(model)


def test_blocks_called_out_of_order_are_refused() -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    anatomy = Anatomy([replace(block, index=DEPTH - 1 - block.index) for block in reversed(Anatomy.of(model).blocks)])
    with pytest.raises(ValueError, match=r"model\.layers\.0 was called in place of model\.layers\.2"):
        record_calls(model, anatomy, token_ids(), Form(None))


def test_skipped_blocks_are_refused() -> None:
    model = tiny("llama")
    anatomy = Anatomy.of(model)
    model.model.config.num_hidden_layers = 2  # transformers runs that many
    with pytest.raises(ValueError, match="call all 3 blocks, it called only the first 2"):
        record_calls(model, anatomy, token_ids(), Form(None))


def test_forms_other_than_a_tensor_first_are_refused() -> None:
    tensor = torch.ones(1)
    assert Form.of(tensor, "a").wrap(tensor) is tensor
    assert Form.of((tensor, 1, 2), "a").wrap(tensor) == (tensor, None, None)
    for output in ([tensor], (None, tensor), ()):
        with pytest.raises(ValueError, match=r"model\.layers\.0 returned (list|tuple)"):
            Form.of(output, "model.layers.0")


def test_calls_without_hidden_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"h\.0 was called with \[4, 1, 2, 3\] and the keywords \['mask'\]"):
        Call.split("h.0", (torch.ones(4, 1, 2, 3),), {"mask": None})
    with pytest.raises(ValueError, match=r"h\.0 was called with NoneType and the keywords \['x'\]"):
        Call.split("h.0", (), {"x": torch.ones(1, 2, 3)})


def test_hidden_states_may_come_by_keyword(llama: Replay) -> None:
    hidden = llama.embed(token_ids())
    call, entering = Call.split("h.0", (), {"hidden_states": hidden, "mask": None})
    assert entering is hidden
    assert call.kwargs == {"mask": None}
    assert call.run(Echo(), hidden) is hidden


class Echo(torch.nn.Module):
    def forward(self, *, hidden_states: Tensor, mask: None) -> Tensor:
        return hidden_states
