from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.calls import Call, record_calls
from recon.models.forwards import Form
from recon.models.replay import Replay
from recon.models.windows import (
    BlockWindow,
    GroupWindow,
    MixerWindow,
    MLPWindow,
    Window,
    Windows,
    block_windows,
    group_windows,
    submodule_windows,
)
from tests.support.families import DEPTH, DIM, FAMILIES, tiny, token_ids

NAMES = [f"{index:03d}.{kind}" for index in range(DEPTH) for kind in ("attention", "mlp")]
PARALLEL = {"cohere", "phi", "gptj", "falcon"}  # attention and MLP read the same normalised input
ADDS_ATTENTION = {"llama", "mistral", "qwen2", "qwen3", "stablelm", "phi3", "opt", "gpt2", "gpt_neo", "mpt"}


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
        handles.append(block.mixer.register_forward_hook(keep("attention")))
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


def halves(replay: Replay) -> list[list[str]]:
    """Every other matrix of a block, and the rest: groups that fit any family and cross attention and MLP."""
    block = replay.anatomy.blocks[0]
    patterns = ["*" + name.removeprefix(block.name) for name in block.matrices]
    return [patterns[::2], patterns[1::2]]


def all_windows(replay: Replay) -> list[Window]:
    return [
        *submodule_windows(replay),
        *block_windows(replay.anatomy, 2),
        *group_windows(replay, halves(replay)),
    ]


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


QKVO = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]
GATED = ["*.gate_proj", "*.up_proj", "*.down_proj"]
GROUPS: list[tuple[str, list[list[str]], list[list[str]]]] = [  # family, groups, ends of each
    (
        "llama",
        [["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.gate_proj", "*.up_proj"], ["*.down_proj"]],
        [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    ),
    ("llama", [QKVO, GATED], [["o_proj"], ["down_proj"]]),
    ("llama", [["*.o_proj", "*.gate_proj", "*.up_proj"], ["*.q_proj", "*.down_proj"]], [GATED[:2], GATED[2:]]),
    ("gemma2", [QKVO, GATED[:2], GATED[2:]], [["o_proj"], GATED[:2], GATED[2:]]),
    ("gpt2", [["*.c_attn"], ["*.attn.c_proj"], ["*.c_fc", "*.mlp.*"]], [["c_attn"], ["attn.c_proj"], ["mlp.c_proj"]]),
    ("phi", [["*_proj"], ["*.dense", "*.fc2"], ["*.fc1"]], [QKVO[:3], ["dense", "fc2"], ["fc1"]]),  # parallel
]


def matrix_outputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What every matrix of every block returns in a plain forward pass; copies, since Falcon adds to one in place."""
    outputs: dict[str, Tensor] = {}
    handles = [
        matrix.module.register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output.clone()})
        )
        for block in Anatomy.of(model).blocks
        for name, matrix in block.matrices.items()
    ]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize(("family", "groups", "ends"), GROUPS)
@torch.no_grad()
def test_a_group_window_returns_what_its_last_matrices_return_within_the_model(
    family: str, groups: list[list[str]], ends: list[list[str]]
) -> None:
    model = tiny(family)
    replay, outputs = replay_of(model), matrix_outputs(model, token_ids())
    hidden = [replay.embed(token_ids()), *states_in(model, token_ids())[0]]
    windows = group_windows(replay, groups)
    assert len(windows) == DEPTH * len(groups)
    for number, window in enumerate(windows):
        index, group = divmod(number, len(groups))
        assert window.indices == [index]
        suffixes = [end.removeprefix("*.") for end in ends[group]]
        assert all(name.endswith(f".{suffix}") for name, suffix in zip(window.ends, suffixes, strict=True))
        assert window.holds_nonlinearity == (len(window.matrices) > len(suffixes))
        expected = torch.cat([outputs[name] for name in window.ends], dim=-1)
        assert torch.equal(window.forward(replay, hidden[index]), expected)


def test_ends_are_the_matrices_whose_output_moves_no_other(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    for window in group_windows(replay, halves(replay))[2:4]:  # of the block in the middle
        expected = []
        before = matrix_outputs(model, token_ids())
        for name in window.matrices:
            moved = model.get_submodule(name).register_forward_hook(lambda module, args, output: output.flip(-1))
            after = matrix_outputs(model, token_ids())
            moved.remove()
            if all(torch.equal(before[other], after[other]) for other in window.matrices if other != name):
                expected.append(name)
        assert window.ends == expected


def test_group_windows_own_weights_and_biases_of_their_matrices_alone(model: PreTrainedModel) -> None:
    replay = replay_of(model)
    parameters = set(dict(model.named_parameters()))
    windows = group_windows(replay, halves(replay))
    for window in windows:
        both = [f"{name}.{kind}" for name in window.matrices for kind in ("weight", "bias")]
        assert sorted(window.owned) == sorted(parameters.intersection(both))
        assert window.shared == []
    every = [name for window in windows for name in window.matrices]
    assert sorted(every) == sorted(name for block in replay.anatomy.blocks for name in block.matrices)


def test_names_of_group_windows_sort_in_the_order_of_recovery(llama: Replay) -> None:
    windows = group_windows(llama, [["*.up_proj", "*.gate_proj"], ["*.down_proj"], ["*.0.*.o_proj"]])
    names = [window.name for window in windows]
    assert names[:4] == ["000.0-gate_proj-up_proj", "000.1-down_proj", "000.2-o_proj", "001.0-gate_proj-up_proj"]
    assert len(names) == 7  # the third group is absent from blocks 1 and 2
    ten = [[f"*.{index}.*.{kind}_proj"] for kind in ("q", "k", "v", "o") for index in range(DEPTH)]
    many = [window.name for window in group_windows(llama, ten)]
    assert many[:2] == ["000.00-q_proj", "000.03-k_proj"]
    assert many == sorted(many)


def test_a_pass_ends_with_the_last_matrix_of_the_group(broken_mlp: Replay) -> None:
    hidden = broken_mlp.embed(token_ids())
    names = [f"model.layers.0.{inner}" for inner in ("mlp.gate_proj", "self_attn.o_proj", "mlp.up_proj")]
    gate, attention, up = broken_mlp.outputs(0, hidden, names)
    assert gate.shape == up.shape == (2, 12, 64)
    assert attention.shape == (2, 12, DIM)


def test_patterns_that_match_nothing_or_twice_are_refused(llama: Replay) -> None:
    with pytest.raises(ValueError, match=r"'\*\.c_attn' matches none of 21, which begin with model\.layers\.0\.self"):
        group_windows(llama, [["*.q_proj", "*.c_attn"]])
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj matches 2: \['\*\.q_proj'\] and \['\*\.self_attn\.\*'"):
        group_windows(llama, [["*.q_proj"], ["*.down_proj"], ["*.self_attn.*"]])
    for groups in ([], [["*"], []]):
        with pytest.raises(ValueError, match=r"windows\.groups needs at least one group of at least one pattern, got"):
            Windows(groups)
    assert len(group_windows(llama, Windows([["*.q_proj", "*.q_*"]]).groups)) == DEPTH


class Experts(torch.nn.Module):
    """Sends each token to one of two matrices, after one that sees all tokens in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (torch.nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = self.first(hidden.reshape(-1, DIM))
        chosen = torch.arange(len(flat)) % 3 == 0
        output = torch.empty_like(flat)
        output[chosen], output[~chosen] = self.a(flat[chosen]), self.b(flat[~chosen])
        return output.view_as(hidden)


class Twice(Experts):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.a(self.a(hidden))


def with_mlp(mlp: torch.nn.Module) -> Replay:
    model = tiny("llama")
    model.model.layers[1].mlp = mlp
    return replay_of(model)


def test_matrices_that_do_not_see_every_token_once_are_refused() -> None:
    experts, twice = with_mlp(Experts()), with_mlp(Twice())
    with pytest.raises(
        ValueError, match=r"mlp\.a returned \[\[2, 32\]\] for hidden states \[1, 4, 32\], as experts do"
    ):
        group_windows(experts, [["*.mlp.a", "*.mlp.b"]])
    with pytest.raises(ValueError, match=r"mlp\.b returned \[\[16, 32\]\] for hidden states \[2, 12, 32\]"):
        experts.outputs(1, experts.embed(token_ids()), ["model.layers.1.mlp.b"])
    with pytest.raises(ValueError, match=r"mlp\.a returned \[\[1, 4, 32\], \[1, 4, 32\]\] for"):
        group_windows(twice, [["*.mlp.a"]])
    with pytest.raises(ValueError, match=r"'\*\.mlp\.b' matches none of 19"):
        group_windows(twice, [["*.mlp.b"]])


@torch.no_grad()
def test_matrices_that_see_all_tokens_in_a_row_return_sequences() -> None:
    replay = with_mlp(Experts())
    (window,) = group_windows(replay, [["*.mlp.first"]])
    expected = matrix_outputs(replay.model, token_ids())["model.layers.1.mlp.first"]
    output = window.forward(replay, replay.run(0, replay.embed(token_ids())))
    assert torch.equal(output, expected.view(2, 12, DIM))


def test_group_windows_may_train_under_autocast(model: PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        replay = replay_of(model)
        window = group_windows(replay, halves(replay))[0]
        assert isinstance(window, GroupWindow)
        window.forward(replay, replay.embed(token_ids()).detach()).float().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None}.issuperset(window.owned)


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


def test_arguments_that_depend_on_the_tokens_are_refused() -> None:
    model = tiny("gemma4_text", head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96)
    with pytest.raises(ValueError, match=r"A replayed block must.*model\.layers\.0 differs by"):
        replay_of(model)


def side_by_side() -> PreTrainedModel:
    """A model whose experts lie side by side in one matrix, and whose attention returns the residual stream, too."""
    experts = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": DIM}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    sizes = {"d_model": DIM, "n_layers": DEPTH, "n_heads": 4}
    return tiny("dbrx", **sizes, attn_config=attention, ffn_config=experts)


def test_an_attention_that_returns_more_than_its_output_is_refused() -> None:
    model = side_by_side()
    for block in model.transformer.blocks:
        block.ffn = torch.nn.Linear(DIM, DIM)
    with pytest.raises(ValueError, match=r"blocks\.0 needs more than the first output of .*norm_attn_norm"):
        replay_of(model)


def test_experts_side_by_side_in_one_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.experts\.mlp\.w1 \[64, 32\], which multiplies in parts"):
        Anatomy.of(side_by_side())


def test_blocks_that_run_twice_are_refused() -> None:
    model = tiny("llama")
    no_rotation = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    model.model.norm.register_forward_pre_hook(
        lambda module, args: model.model.layers[0](args[0], position_embeddings=no_rotation)
    )
    with pytest.raises(ValueError, match=r"call each block once, model\.layers\.0 was called 2 times"):
        replay_of(model)


def test_a_block_that_does_not_call_its_attention_is_one_window_without_it() -> None:
    model = tiny("llama")
    block = model.model.layers[0]
    block.forward = lambda hidden_states, **kwargs: block.mlp(hidden_states)
    replay = replay_of(model)
    assert [window.name for window in submodule_windows(replay)] == ["000", *NAMES[2:]]
    assert [name.rpartition(".")[2] for name in replay.anatomy.blocks[0].matrices] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert len(replay.anatomy.blocks[0].left_dense()) == 4


def test_blocks_called_out_of_order_are_refused() -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    anatomy = Anatomy([replace(block, index=DEPTH - 1 - block.index) for block in reversed(Anatomy.of(model).blocks)])
    with pytest.raises(ValueError, match=r"model\.layers\.0 was called in place of model\.layers\.2"):
        record_calls(model, anatomy, token_ids(), [Form(None)] * DEPTH)


def test_skipped_blocks_are_refused() -> None:
    model = tiny("llama")
    anatomy = Anatomy.of(model)
    model.model.config.num_hidden_layers = 2  # transformers runs that many
    with pytest.raises(ValueError, match="call all 3 blocks, it called only the first 2"):
        record_calls(model, anatomy, token_ids(), [Form(None)] * DEPTH)


def test_forms_other_than_a_tensor_first_are_refused() -> None:
    tensor = torch.ones(1)
    assert Form.of(tensor, "a").wrap(tensor) is tensor
    assert Form.of((tensor, 1, 2), "a").wrap(tensor) == (tensor, None, None)
    assert Form.of([tensor, 1], "a").wrap(tensor) == [tensor, None]
    for output in ({"a": tensor}, (None, tensor), ()):
        with pytest.raises(ValueError, match=r"model\.layers\.0 returned (dict|tuple)"):
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
