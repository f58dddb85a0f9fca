import pytest
import torch
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from recon.models.windows import (
    BlockWindow,
    MixerWindow,
    MLPWindow,
    block_windows,
    group_windows,
    submodule_windows,
)
from tests.support.families import DEPTH, DIM, tiny, token_ids
from tests.support.replays import NAMES, all_windows, replay_of, states_in

PARALLEL = {"cohere", "phi", "gptj", "falcon"}  # attention and MLP read the same normalised input
ADDS_ATTENTION = {"llama", "mistral", "qwen2", "qwen3", "stablelm", "phi3", "opt", "gpt2", "gpt_neo", "mpt"}


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
def test_one_replay_serves_several_shapes_and_keeps_four(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    for batch, seq in [(1, 12), (3, 12), (2, 5), (2, 7), (1, 12)]:
        tokens = token_ids(batch, seq)
        hidden = replay.embed(tokens)
        for index, expected in enumerate(states_in(model, tokens)[0]):
            hidden = replay.run(index, hidden)
            assert torch.equal(hidden, expected)
    assert len(replay._calls) == 4


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
    assert [window.name for window in windows] == NAMES
    assert [window.name for window in windows] == sorted(window.name for window in windows)
    for block, attention, mlp in zip(replay.anatomy.blocks, windows[::2], windows[1::2], strict=True):
        assert isinstance(attention, MixerWindow)
        assert isinstance(mlp, MLPWindow)
        assert attention.indices == mlp.indices == [block.index]
        assert attention.shared == mlp.shared
        assert sorted(attention.owned + mlp.owned + mlp.shared) == sorted(block.parameters())
        assert bool(mlp.shared) == (model.config.model_type in PARALLEL)
        for name in block.matrices:  # matrices go where the module tree says
            owner = attention if name.startswith(block.mixer_name) else mlp
            assert f"{name}.weight" in owner.owned


def test_windows_say_what_enters_them_and_what_they_reproduce(llama: Replay) -> None:
    attention, mlp = submodule_windows(llama)[:2]
    block, group = block_windows(llama.anatomy, 1)[0], group_windows(llama, [["*.q_proj", "*.k_proj"]])[0]
    windows = (attention, mlp, block, group)
    assert [window.target for window in windows] == ["attention", "output", "output", "recorded"]
    assert [window.takes_attention for window in windows] == [False, True, False, False]
    assert [window.needs_dense_block for window in windows] == [False, False, False, True]
    assert [window.facts for window in windows] == [{}, {}, {}, {"holds_nonlinearity": False}]


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


@pytest.mark.parametrize(
    ("size", "stride", "indices"),
    [
        (3, None, [[0, 1, 2], [3, 4, 5], [6]]),
        (3, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        (3, 2, [[0, 1, 2], [2, 3, 4], [4, 5, 6]]),
        (4, 2, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]),
        (2, 1, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]),
        (7, 1, [[0, 1, 2, 3, 4, 5, 6]]),
        (9, 4, [[0, 1, 2, 3, 4, 5, 6]]),
    ],
)
def test_block_windows_overlap_by_their_stride(size: int, stride: int | None, indices: list[list[int]]) -> None:
    anatomy = Anatomy.of(tiny("llama", num_hidden_layers=7))
    windows = block_windows(anatomy, size, stride)
    assert [window.indices for window in windows] == indices
    names = [window.name for window in windows]
    assert names == sorted(set(names))
    assert {index for window in windows for index in window.indices} == set(range(7))
    for window in windows:
        assert window.owned == [name for index in window.indices for name in anatomy.blocks[index].parameters()]


@pytest.mark.parametrize("stride", [0, -1, 3])
def test_a_stride_that_skips_blocks_or_stands_still_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 and at most their size 2, got {stride}"):
        block_windows(Anatomy.of(tiny("llama")), 2, stride)


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


def test_blocks_that_read_only_the_sum_of_input_and_attention(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    expected = model.config.model_type in ADDS_ATTENTION
    assert [replay.adds_attention(index) for index in range(DEPTH)] == [expected] * DEPTH
    hidden = replay.embed(token_ids(3, 9))
    attention = replay.tap(2, hidden)  # a real one, on other tokens
    output, of_sum = replay.stub(2, hidden, attention), replay.stub(2, hidden + attention, torch.zeros_like(hidden))
    assert torch.allclose(output, of_sum, rtol=1e-4, atol=1e-4) == expected


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("gpt_neox", {"use_parallel_residual": False}, True),
        ("falcon", {"parallel_attn": False}, True),
        ("stablelm", {"use_parallel_residual": True}, False),
        ("granite", {"residual_multiplier": 1.0}, True),
        ("granite", {"residual_multiplier": 0.99}, False),
        ("opt", {"do_layer_norm_before": False}, True),  # a norm after the sum
    ],
)
def test_options_decide_whether_a_block_adds_its_attention(family: str, options: dict, expected: bool) -> None:
    replay = replay_of(tiny(family, **options))
    assert [replay.adds_attention(index) for index in range(DEPTH)] == [expected] * DEPTH
    replay.model.to(torch.bfloat16)
    assert replay.adds_attention(1) == expected


def test_a_parallel_block_with_a_small_mlp_does_not_pass_for_one_that_adds_its_attention() -> None:
    replay = replay_of(tiny("phi"))
    with torch.no_grad():
        for parameter in replay.model.model.layers[0].mlp.fc2.parameters():
            parameter.mul_(1e-5)
    assert not replay.adds_attention(0)


def test_a_block_that_ignores_its_input_does_not_pass_for_one_that_adds_its_attention(llama: Replay) -> None:
    block = llama.anatomy.blocks[1].module
    handle = block.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    assert not llama.adds_attention(1)
    handle.remove()
    assert llama.adds_attention(1)


def test_mlp_window_asks_for_the_attention_output(llama: Replay) -> None:
    window = submodule_windows(llama)[1]
    with pytest.raises(ValueError, match=r"000\.mlp needs the output of model\.layers\.0\.self_attn as `atten"):
        window.forward(llama, llama.embed(token_ids()))
