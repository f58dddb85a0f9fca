"""Windows of groups of matrices."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from recon.models.windows import (
    GroupWindow,
    Windows,
    group_windows,
)
from tests.support.families import DEPTH, DIM, tiny, token_ids
from tests.support.replays import halves, replay_of, states_in

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
