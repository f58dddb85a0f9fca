"""The schedule of a local scope, on windows over blocks without a model and without a trainer."""

import ast
import inspect
import random
from itertools import product

import pytest
from torch import nn

from recon.distributed.part import Share
from recon.models.anatomy import Block
from recon.models.windows import BlockWindow, GroupWindow, MixerWindow, MLPWindow, Window
from recon.scopes.local.schedule import (
    Schedule,
    require_independent,
    require_propagation,
    require_recovered_inputs,
)

DEPTH = 5
MATRICES = ("attention.q", "attention.o", "mlp.up", "mlp.down")


def block(index: int) -> Block:
    return Block(index, f"layers.{index}", nn.Identity(), {})


def names(index: int, *parts: str) -> list[str]:
    return [f"layers.{index}.{matrix}.weight" for matrix in MATRICES if matrix.startswith(parts or ("",))]


def submodules() -> list[Window]:
    windows: list[Window] = []
    for one in map(block, range(DEPTH)):
        windows.append(MixerWindow(f"{one.index:03d}.attention", [one], names(one.index, "attention"), []))
        windows.append(MLPWindow(f"{one.index:03d}.mlp", [one], names(one.index, "mlp"), []))
    return windows


def blocks(size: int = 1, stride: int = 1) -> list[Window]:
    every = list(map(block, range(DEPTH)))
    spans = [every[start : start + size] for start in range(0, DEPTH - size + 1, stride)]
    return [
        BlockWindow(f"{span[0].index:03d}", span, [name for one in span for name in names(one.index)], [])
        for span in spans
    ]


def groups() -> list[Window]:
    return [
        GroupWindow(f"{one.index:03d}.{number}", [one], [name], [], [name], [name])
        for one in map(block, range(DEPTH))
        for number, name in enumerate(names(one.index))
    ]


KINDS = {"submodules": submodules, "blocks": blocks, "overlapping": lambda: blocks(3), "groups": groups}
ALL = [name for index in range(DEPTH) for name in names(index)]


def finish(schedule: Schedule, masked: list[str], until: int | None = None) -> list[list[str]]:
    """Go through the own windows as a fit does, some of them only; return the names begun by each."""
    begun = []
    for _ in range(len(schedule.missing(schedule.own)) if until is None else until):
        written, window = schedule.upcoming()
        for one in [*written, window]:
            schedule.enter(one)
            begun.append(schedule.begin(one, masked))
            schedule.finish(one, {"name": one.name})
    for one in schedule.unfinished(schedule.own):
        if not schedule.missing([one]):
            schedule.enter(one)
            begun.append(schedule.begin(one, masked))
            schedule.finish(one, {"name": one.name})
    return begun


# --- every owned masked weight is begun exactly once -----------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_every_masked_weight_of_a_window_is_begun_exactly_once(kind: str, seed: int) -> None:
    generator = random.Random(seed)
    masked = sorted(generator.sample(ALL, generator.randint(1, len(ALL))))
    schedule = Schedule(KINDS[kind](), masked, masked)
    begun = [name for one in finish(schedule, masked) for name in one]
    assert sorted(begun) == masked
    assert schedule.begun == begun
    assert list(schedule.results) == [window.name for window in schedule.windows]
    assert not schedule.unfinished(schedule.windows)


def test_only_windows_with_a_pruned_weight_are_recovered() -> None:
    pruned = names(1, "mlp") + names(3, "attention")
    schedule = Schedule(submodules(), ALL, pruned)
    assert [window.name for window in schedule.windows] == ["001.mlp", "003.attention"]
    assert schedule.owner(names(1, "attention")[0]) is None
    assert schedule.owner(pruned[0]) is schedule.windows[0]
    # A mask of ones that shares a window with pruned weights is begun with them, for it is enforced, too.
    finish(schedule, ALL)
    assert schedule.begun == pruned


def test_a_schedule_of_nothing_has_nothing_to_do() -> None:
    schedule = Schedule()
    assert (list(schedule.windows), list(schedule.own), schedule.begun, schedule.starts()) == ([], [], [], set())
    schedule.require_written(schedule.windows)


def test_blocks_are_fresh_once_where_windows_overlap() -> None:
    schedule = Schedule(blocks(3), ALL, ALL)
    fresh = [[one.index for one in schedule.enter(window)] for window in schedule.windows]
    assert fresh == [[0, 1, 2], [3], [4]]
    assert schedule.starts() == {0, 1, 2}


# --- resume ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(2 * DEPTH + 1))
def test_a_resumed_fit_skips_what_is_written_and_ends_the_same(stop: int) -> None:
    windows = submodules()
    straight = Schedule(windows, ALL, ALL)
    finish(straight, ALL)
    first = Schedule(windows, ALL, ALL)
    finish(first, ALL, until=stop)
    written = [window for window in windows if window.name in first.results]
    assert len(written) == stop
    again = Schedule(windows, ALL, ALL, written=written)
    assert again.missing(again.own) == windows[stop:]
    if stop < len(windows):
        loaded, following = again.upcoming()
        assert (loaded, following) == (written, windows[stop])
    finish(again, ALL)
    assert again.results == straight.results
    assert again.begun == straight.begun


def test_a_gap_in_what_is_written_is_filled_in_order() -> None:
    windows = blocks()
    written = [windows[0], windows[2], windows[3]]
    schedule = Schedule(windows, ALL, ALL, written=written)
    assert schedule.upcoming() == ([windows[0]], windows[1])
    for window in (windows[0], windows[1]):
        schedule.finish(window, {})
    assert schedule.upcoming() == ([windows[2], windows[3]], windows[4])


def test_a_fit_that_stopped_early_is_refused_and_names_the_window() -> None:
    windows = blocks()
    schedule = Schedule(windows, ALL, ALL, written=windows[:2])
    schedule.finish(windows[2], {})  # without a run directory nothing is written
    with pytest.raises(RuntimeError, match=r"all 5 windows, it stopped before the end of 003; start it again"):
        schedule.require_written(schedule.own)
    schedule.require_written(schedule.windows[:3])


# --- shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "of"), [*product(KINDS, (1, 2, 3, 7, 40))])
def test_shares_cover_all_windows_once_and_in_order(kind: str, of: int) -> None:
    windows = KINDS[kind]()
    shares = [Schedule(windows, ALL, ALL, Share(index, of)) for index in range(of)]
    assert [window for one in shares for window in one.own] == windows
    assert all(one.windows == windows for one in shares)
    masked = {name for one in shares for begun in finish(one, ALL) for name in begun}
    assert masked == set(ALL)


def test_inputs_are_collected_only_for_own_windows_that_are_missing() -> None:
    windows = blocks()
    schedule = Schedule(windows, ALL, ALL, Share(0, 2), written=[windows[0]])
    assert len(schedule.own) == 2
    assert [name for name in ALL if schedule.is_known_now(name)] == names(1)
    assert not schedule.is_known_now("embedding.weight")


def test_one_process_takes_in_the_windows_of_the_others() -> None:
    windows = blocks()
    first = Schedule(windows, ALL, ALL, Share(0, 2))
    finish(first, ALL)
    assert first.unfinished(first.windows) == windows[2:]


# --- inputs that are known later -------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["dense", "recovered_local", "recovered"])
def test_recovered_inputs_of_an_mlp_are_known_after_attention(propagation: str) -> None:
    schedule = Schedule(submodules(), ALL, ALL, propagation=propagation)  # type: ignore[arg-type]
    later = [] if propagation == "dense" else names(2, "mlp")
    attention, mlp = schedule.windows[4:6]
    assert [name for name in names(2) if schedule.is_known_later(name)] == later
    assert [name for name in names(2) if schedule.is_known_now(name)] == [n for n in names(2) if n not in later]
    assert schedule.known_later(attention, ALL) == []
    assert schedule.known_later(mlp, ALL) == later
    assert schedule.known_later(mlp, names(2, "mlp.up")) == later[:1]


def test_every_input_is_known_at_one_time_of_the_two() -> None:
    for kind in ("submodules", "blocks"):
        schedule = Schedule(KINDS[kind](), ALL, ALL, propagation="recovered")
        assert all(schedule.is_known_now(name) != schedule.is_known_later(name) for name in ALL)


# --- dense blocks ----------------------------------------------------------------------------------------


def test_the_last_window_of_a_block_is_the_last_that_is_recovered_there() -> None:
    pruned = [name for name in ALL if not name.startswith("layers.1.mlp")]
    schedule = Schedule(groups(), ALL, pruned)
    last = [window.name for window in schedule.windows if schedule.is_last_of_block(window)]
    assert last == ["000.3", "001.1", "002.3", "003.3", "004.3"]


# --- refusals --------------------------------------------------------------------------------------------


def test_a_masked_weight_outside_all_windows_is_refused_whether_pruned_or_not() -> None:
    with pytest.raises(ValueError, match=r"pruned weight must belong to one window, got 2 .*layers.4.attention.q.wei"):
        Schedule(blocks()[:-1], [*names(0), *names(4)[:2]], names(0))


@pytest.mark.parametrize("propagation", ["recovered_local", "recovered"])
def test_recovered_inputs_refuse_what_needs_dense_weights(propagation: str) -> None:
    with pytest.raises(ValueError, match=rf"groups of matrices .* got model.propagation: {propagation}"):
        require_propagation(groups(), propagation)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"strategy x needs windows .* got model.propagation: {propagation}"):
        require_independent(propagation, "strategy x")  # type: ignore[arg-type]
    require_recovered_inputs(propagation)  # type: ignore[arg-type]


def test_overlapping_windows_have_no_dense_weights_for_recovered_inputs() -> None:
    with pytest.raises(ValueError, match="overlapping windows have no dense weights left"):
        Schedule(blocks(2), ALL, ALL, propagation="recovered_local")
    require_propagation(blocks(2), "recovered")
    require_propagation(submodules(), "recovered_local")  # two windows a block, which do not overlap


def test_dense_inputs_suit_all_windows_but_not_masks_of_recovered_inputs() -> None:
    for kind in KINDS.values():
        require_propagation(kind(), "dense")
    require_independent("dense", "anything")
    with pytest.raises(ValueError, match=r"pruning.inputs: recovered .* got model.propagation: dense"):
        require_recovered_inputs("dense")


def test_the_schedule_itself_imports_neither_trainer_nor_tensors() -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(Schedule)))  # type: ignore[arg-type]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "recon.models.windows" in imported
    assert not [name for name in imported if name and name.split(".")[0] in ("lightning", "torch")]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
