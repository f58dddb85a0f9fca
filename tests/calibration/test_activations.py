import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.calibration.activations import Activations
from recon.calibration.storage import Storage
from recon.models.anatomy import Anatomy
from recon.models.experts import ExpertStatistics
from recon.models.replay import Replay
from recon.models.windows import GroupWindow, group_windows
from tests.support.families import DEPTH, DIM, tiny, token_ids

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
TOKENS = token_ids(batch=5, seq=12)  # no multiple of the batch sizes below


def walk_of(model: PreTrainedModel, batch_size: int = 2) -> Activations:
    return Activations(Replay(model, Anatomy.of(model)), TOKENS, batch_size, CPU, tap=True)


def dense_states(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """What enters and leaves every block and its attention, from one plain forward pass."""
    states: list[dict[str, Tensor]] = [{} for _ in range(DEPTH)]

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    for state, block in zip(states, Anatomy.of(model).blocks, strict=True):
        block.module.register_forward_hook(
            lambda module, args, kwargs, out, state=state: state.update(
                hidden=args[0] if args else kwargs["hidden_states"], output=first(out)
            ),
            with_kwargs=True,
        )
        block.mixer.register_forward_hook(lambda module, args, out, state=state: state.update(attention=first(out)))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return states


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "bloom"])
def test_a_walk_sees_what_the_whole_model_computes(family: str, batch_size: int) -> None:
    expected = dense_states(tiny(family))
    walk = walk_of(tiny(family), batch_size)
    assert walk.output is None
    assert walk.attention is None
    for index, state in enumerate(expected):
        walk.enter([index])
        for name, tensor in state.items():
            torch.testing.assert_close(getattr(walk, name), tensor, rtol=1e-4, atol=1e-5)


def test_several_blocks_are_entered_at_once() -> None:
    expected = dense_states(tiny("llama"))
    walk = walk_of(tiny("llama"))
    walk.enter([0, 1])
    torch.testing.assert_close(walk.hidden, expected[0]["hidden"])
    torch.testing.assert_close(walk.output, expected[1]["output"])
    assert walk.attention is None
    walk.enter([2])
    torch.testing.assert_close(walk.hidden, expected[2]["hidden"])
    torch.testing.assert_close(walk.attention, expected[2]["attention"])


@pytest.mark.parametrize("first", [[0], []])
def test_blocks_in_between_are_passed(first: list[int]) -> None:
    step_by_step, jumping = walk_of(tiny("llama")), walk_of(tiny("llama"))
    for index in range(DEPTH):
        step_by_step.enter([index])
    for index in (*first, 2):
        jumping.enter([index])
    for name in ("hidden", "attention", "output"):
        assert torch.equal(getattr(jumping, name), getattr(step_by_step, name))


def test_a_block_is_computed_once_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = walk_of(tiny("llama"))
    walk.enter([0])
    output = walk.output
    monkeypatch.setattr(walk, "_pass", lambda: pytest.fail("computed again"))
    walk.enter([0])
    assert walk.output is output
    with pytest.raises(AssertionError, match="in order"):
        walk.enter([0, 1])


def test_the_outputs_of_dense_blocks_survive_pruning_them() -> None:
    model = tiny("llama")
    expected = dense_states(tiny("llama"))
    walk = walk_of(model)
    for index, block in enumerate(Anatomy.of(model).blocks):
        walk.enter([index])
        for parameter in block.module.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(walk.output, expected[index]["output"])
    walk.compute()
    torch.testing.assert_close(walk.output, expected[-1]["hidden"])  # an empty block adds nothing


NUM, SEQ = 16, 32
COPY = NUM * SEQ * DIM * 4


def num_copies() -> int:
    """How many tensors there are that are at least as large as one copy of the hidden states."""
    storages = {
        one.untyped_storage().data_ptr()
        for one in gc.get_objects()
        if issubclass(type(one), Tensor) and one.untyped_storage().nbytes() >= COPY
    }
    return len(storages)


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize(("windows", "most"), [([[0], [1], [2]], 3), ([[0, 1], [2]], 3), ([[0, 1, 2]], 2)])
@pytest.mark.parametrize("propagation", ["dense", "recovered_local", "recovered"])
def test_two_copies_of_the_hidden_states_and_one_attention_output_at_most(
    propagation: Any, windows: list[list[int]], most: int, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    others = num_copies()
    tokens = token_ids(batch=NUM, seq=SEQ)
    replay, storage = Replay(model, Anatomy.of(model)), Storage(place)
    walk = Activations(replay, tokens, 2, CPU, propagation, tap=True, storage=storage)
    counts = []
    run = Replay.run

    def counting(replay: Replay, index: int, hidden: Tensor) -> Tensor:
        counts.append(num_copies() - others)
        return run(replay, index, hidden)

    monkeypatch.setattr(Replay, "run", counting)
    for window in windows:
        walk.enter(window)
        if len(window) == 1:
            walk.pass_attention()
        counts.append(num_copies() - others)
    walk.compute()
    assert len(counts) >= 8 * DEPTH
    assert max(counts) == most


@pytest.mark.usefixtures("small_heap")
def test_one_copy_more_is_recorded_for_a_group_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    others = num_copies()
    replay = Replay(model, Anatomy.of(model))
    window = group_windows(replay, [["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.mlp.*"]])[0]
    walk = Activations(replay, token_ids(batch=NUM, seq=SEQ), 2, CPU)
    walk.enter([0])
    forward, counts = GroupWindow.forward, []

    def counting(*args: Any) -> Tensor:
        counts.append(num_copies() - others)
        return forward(*args)

    monkeypatch.setattr(GroupWindow, "forward", counting)
    for _ in range(2):  # the second lets go of the first
        walk.record(window)
        counts.append(num_copies() - others)
    assert max(counts) == 3
    with torch.no_grad():
        expected = torch.cat([window.forward(replay, hidden) for hidden in walk.hidden.split(2)])
    assert walk.recorded is not None
    assert torch.equal(walk.recorded, expected)


class FixedReplay(Replay):
    """Every block adds its number to the hidden states, which start at a given value."""

    def __init__(self, start: Tensor) -> None:
        self.start, self.anatomy, self.experts = start, Anatomy([]), ExpertStatistics()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.start[: len(tokens)]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        return hidden + index


def test_large_but_finite_half_precision_is_no_overflow() -> None:
    walk = Activations(FixedReplay(torch.full((2, 12, DIM), 6e4, dtype=torch.float16)), TOKENS, 2, CPU)
    walk.enter([0])
    assert walk.output is not None
    assert walk.output.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_no_number_names_block_and_batch(bad: float) -> None:
    walk = walk_of(tiny("llama"))
    walk.enter([0])
    assert walk.output is not None
    walk.output[3, 2, 1] = bad
    with pytest.raises(FloatingPointError, match="after block 1 in the batch that begins with sequence 2;"):
        walk.enter([1])
