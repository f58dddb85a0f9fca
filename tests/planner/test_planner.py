"""Predictions against counts by hand and against live bytes of real training on the CPU."""

import gc
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._pytree import tree_leaves

from callbacks import MaskEnforcer
from recon.cli.configs import config_directory
from recon.cli.fit import parse_only
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.models.replay import Replay
from recon.models.windows import submodule_windows
from recon.planner import Kind, PlanOptions, Shape, predict, propose
from recon.planner.fake.model import FakeModel
from recon.planner.fake.tracker import Tracker
from recon.planner.flops import KINDS
from recon.planner.local import solver_bytes
from recon.planner.trainer_options import trainer_options
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Pretraining, SubmoduleDistillation
from recon.solvers import ConjugateGradients, LeastSquares
from tests.support.families import tiny
from tests.support.scope_fixtures import IGNORED, data_of, prepared, trainer_of
from tests.support.shapes import PLANNED as LLAMA
from tests.support.slow import quick

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]

V, D, H, L = 2048, 64, 160, 3

SHALLOW = {**LLAMA, "num_hidden_layers": 2}

GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4}

MATRICES = 4 * D * D + 3 * D * H

BLOCK = MATRICES + 2 * D

N = 2 * V * D + L * BLOCK + D

BUFFERS = 2 * 4 * 8  # inverse frequencies of half a head, as they are and as they were

MODELS = sorted((config_directory() / "models").glob("*.yaml"))

TOTALS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
}


def shape_of(sizes: dict[str, Any] = LLAMA, **options: Any) -> Shape:
    return Shape(ModelSource("random", sizes, **options))


def test_every_model_has_a_total() -> None:
    assert {path.stem for path in MODELS} == set(TOTALS)


LARGEST = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")
"""Take seconds to lay out."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LARGEST else (), id=path.stem) for path in MODELS],
)
def test_a_model_has_the_published_size_and_plans(path: Any) -> None:
    sizes = yaml.safe_load(path.read_text())["model"]["shape"]
    assert shape_of(sizes).num_parameters == TOTALS[path.stem]
    assert_plans(shape_of(sizes | {"num_hidden_layers": 2}))  # what lies deeper is like it


def test_a_deep_model_plans() -> None:
    sizes = yaml.safe_load((config_directory() / "models" / "llama-2-70b.yaml").read_text())["model"]["shape"]
    assert_plans(shape_of(sizes))


def assert_plans(shape: Shape) -> None:
    options = PlanOptions("block", batch_size=1, seq_len=128, num_sequences=2, num_validation=1)
    found = predict(shape, options)
    buffers = shape.fake(options).buffer_bytes
    assert found.peak.held["weights"] == 4 * shape.num_parameters + buffers
    assert buffers in (0, 2 * 4 * 32, 2 * 4 * 64)  # inverse frequencies of half a head, as they are and as they were


@pytest.mark.parametrize("order", [0, 1])
def test_a_model_goes_with_a_scope_in_either_order(order: int) -> None:
    names = ["models/llama-2-7b", "scopes/block"]
    args = [arg for name in (names[order], names[1 - order]) for arg in ("-c", name)]
    config = parse_only([*args, "--model.num_blocks", "2"])
    assert config.model.class_path.endswith("BlockDistillation")
    assert config.model.init_args.shape["hidden_size"] == 4096
    assert config.model.init_args.num_blocks == 2


def test_a_block_by_hand(llama: Shape) -> None:
    options = PlanOptions("block", batch_size=2, seq_len=16, num_sequences=8, num_validation=4, start="pruned")
    assert llama.num_parameters == N
    found = predict(llama, options)
    by_name = {snapshot.name: snapshot.held for snapshot in found.snapshots}
    assert by_name.keys() == {"collect", "forward", "backward", "step"}
    for snapshot in by_name.values():
        assert snapshot["weights"] == 4 * N + BUFFERS
        assert snapshot["calibration"] == 2 * (8 + 4) * 16 * D * 4
    forward = by_name["forward"]
    assert forward["gradients"] == 4 * BLOCK
    assert forward["optimizer"] == 8 * BLOCK + 4 * 9  # seven matrices and two norms
    assert forward["masks"] == MATRICES  # unpacked, those of the window under way
    assert forward["gram"] == 0
    assert by_name["step"]["other"] >= 4 * BLOCK  # on CUDA
    assert found.disk["windows"] == 4 * L * BLOCK
    assert found.disk["masks"] == found.host["masks"] == L * MATRICES // 8
    assert found.disk["model"] == 4 * N
    assert found.host["weights"] == 4 * N + 4 * BLOCK  # the start of the window under way


def test_gram_matrices_by_hand(llama: Shape) -> None:
    options = PlanOptions(
        "matrix", batch_size=2, seq_len=16, num_sequences=8, num_validation=4, start="pruned", epochs=1
    )
    held = {snapshot.name: snapshot.held for snapshot in predict(llama, options).snapshots}
    gram = 4 * (3 * D * D + H * H)  # query, key and value share theirs, gate and up too
    assert held["solve"]["gram"] == held["collect"]["gram"] == gram
    assert held["solve"]["optimizer"] == held["solve"]["gradients"] == 0
    two = predict(llama, replace(options, scope="block", start="exact", num_blocks=2))
    assert {snapshot.name: snapshot.held for snapshot in two.snapshots}["solve"]["gram"] == 2 * gram
    choosing = predict(llama, replace(options, scope="block", propagation="recovered", prunes_by_gram=True))
    assert {snapshot.name: snapshot.held for snapshot in choosing.snapshots}["collect"]["gram"] == gram
    assert "solve" not in {snapshot.name for snapshot in choosing.snapshots}
    cross = predict(llama, replace(options, propagation="recovered"))
    assert cross.peak.held["gram"] == 3 * gram


@pytest.mark.parametrize("spread", [0, 2], ids=["rows finish together", "rows finish one by one"])
def test_what_a_solve_holds_is_what_a_real_one_holds(spread: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 200, generator=generator) * torch.logspace(0, spread, 200)
    gram, dense = X.T @ X, torch.randn(100, 200, generator=generator)
    keep = torch.rand(dense.shape, generator=generator) < 0.5
    with Tracker([gram, dense, keep]) as tracker:
        ConjugateGradients().solve(LeastSquares(gram, dense), keep)
    vectors = tracker.peak.total() - solver_bytes(dense.numel(), casts=False)  # of a number a row or column
    assert 0 <= vectors <= 40 * 4 * 200


@pytest.mark.parametrize(
    ("sharding", "precision", "weights", "gradients", "optimizer"),
    [
        ("ddp", "32-true", 4 * N + BUFFERS, 4 * L * BLOCK, 8 * L * BLOCK + 4 * 9 * L),
        ("zero1", "bf16-mixed", 2 * N + BUFFERS, 2 * L * BLOCK, 6 * L * BLOCK),
        ("zero2", "bf16-mixed", 2 * N + BUFFERS, 2 * L * BLOCK, 6 * L * BLOCK),
        ("zero3", "bf16-mixed", N + BUFFERS, 2 * L * BLOCK, 6 * L * BLOCK),
        # Gradients of accumulated batches stay whole until the last one's are reduced.
        ("fsdp2", "32-true", 2 * N + BUFFERS, 4 * L * BLOCK, 4 * L * BLOCK + 2 * 9 * L),
        ("fsdp2", "bf16-mixed", 2 * N + BUFFERS, 4 * L * BLOCK, 4 * L * BLOCK + 2 * 9 * L),
    ],
)
def test_two_processes_by_hand(
    llama: Shape, sharding: Any, precision: str, weights: int, gradients: int, optimizer: int
) -> None:
    options = PlanOptions("full", 2, 16, 8, 4, start="pruned", loss="cross_entropy", sharding=sharding, world_size=2)
    found = predict(llama, replace(options, precision=precision, accumulate=2))
    forward = next(snapshot.held for snapshot in found.snapshots if snapshot.name == "forward")
    assert (forward["weights"], forward["gradients"], forward["optimizer"]) == (weights, gradients, optimizer)
    if sharding == "fsdp2":
        found = predict(llama, replace(options, precision=precision, accumulate=2, reduce_each_batch=True))
        assert {snapshot.held["gradients"] for snapshot in found.snapshots} == {gradients // 2}


def test_offloaded_training_is_on_the_host(llama: Shape) -> None:
    zero: dict[str, Any] = {"sharding": "zero3", "offload_optimizer": True, "offload_parameters": True}
    options = PlanOptions("full", 2, 16, 8, 4, start="pruned", loss="cross_entropy", precision="bf16-mixed", **zero)
    found = predict(llama, options)
    assert found.peak.held["weights"] == BUFFERS
    assert found.peak.held["optimizer"] == found.peak.held["gradients"] == 0
    assert found.host["optimizer"] == 12 * L * BLOCK
    assert found.host["gradients"] == 8 * L * BLOCK


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("half", [False, True])
def test_what_backward_keeps_is_what_real_windows_keep(family: str, half: bool) -> None:
    model = tiny(family)
    options = PlanOptions("submodule", batch_size=3, seq_len=24, precision="bf16-mixed" if half else "32-true")
    fake = FakeModel(model.config, torch.float32)
    replay = Replay(model, Anatomy.of(model))
    for window, faked in zip(submodule_windows(replay)[:2], fake.windows(options)[:2], strict=True):
        assert window.owned == faked.owned
        model.requires_grad_(False)
        hidden = torch.randn(3, 24, fake.dim)
        attention, target = torch.randn_like(hidden), torch.randn_like(hidden)
        replay._calls_for(hidden)
        left_out = {one.data_ptr() for one in model.parameters()}
        for call in replay._calls_for(hidden):
            left_out |= {one.data_ptr() for one in tree_leaves(call.kwargs) if torch.is_tensor(one)}
        for name in window.owned:
            model.get_parameter(name).requires_grad_(True)
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor, kept: dict[int, Tensor] = kept, left_out: set[int] = left_out) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in left_out:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = window.forward(replay, hidden, attention).float()
            _ = (output - target).square().sum() / target.square().sum()
            measured = sum(one.untyped_storage().nbytes() for one in kept.values())
        assert fake.window(faked, options, torch.float32).kept == pytest.approx(measured, rel=0.02)


SCOPES = {
    "matrix": lambda **options: MatrixReconstruction(activations="device", **options),
    "submodule": lambda **options: SubmoduleDistillation(epochs=2, start="exact", activations="device", **options),
    "two blocks": lambda **options: BlockDistillation(
        epochs=2, num_blocks=2, start="exact", activations="device", **options
    ),
    "full": lambda **options: FullRetraining(epochs=2, **options),
    "distilled": lambda **options: FullRetraining(
        epochs=1, loss="distillation", gradient_checkpointing=True, **options
    ),
    "chunked": lambda **options: FullRetraining(epochs=1, logits_memory="300KiB", **options),
    "chunked, all": lambda **options: FullRetraining(epochs=1, logits_memory="300KiB", train="all", **options),
    "chunked, distilled": lambda **options: FullRetraining(
        epochs=1, logits_memory="300KiB", loss="distillation", gradient_checkpointing=True, **options
    ),
}


@pytest.mark.parametrize(
    ("kind", "sizes", "precision"),
    quick(
        [(kind, LLAMA if kind in ("two blocks", "full") else SHALLOW, "32-true") for kind in SCOPES]
        + [("submodule", GPT2, "32-true"), ("two blocks", SHALLOW, "bf16-mixed"), ("full", GPT2, "bf16-mixed")]
        + [("chunked, distilled", GPT2, "bf16-mixed")],
        *((kind, SHALLOW, "32-true") for kind in ("matrix", "chunked, distilled")),
        *((kind, LLAMA, "32-true") for kind in ("two blocks", "full")),
        *(("submodule", GPT2, "32-true"), ("full", GPT2, "bf16-mixed")),
    ),
)
def test_the_peak_of_a_real_fit(kind: str, sizes: dict[str, Any], precision: Any) -> None:
    scope = SCOPES[kind](name="random", shape=sizes)
    data = data_of(num=24, validation=8, seq=32, batch_size=8)
    trainer = trainer_of(MaskEnforcer(), precision=precision)
    gc.collect()
    with Tracker() as tracker:
        prepared(scope, data)
        gc.collect()
        tracker.reset()
        trainer.fit(scope)
    found = predict(Shape(scope.source), PlanOptions.of(scope, data, trainer_options(trainer)))
    predicted = found.peak.total + found.host["masks"] + found.host["weights"]
    assert predicted == pytest.approx(tracker.peak.total(), rel=0.05)
    if kind != "matrix":  # its work is that of the solver, whose iterations depend on the numbers, as those of starts
        assert found.flops == pytest.approx(tracker.flops, rel=0.15 if scope.by_window else 0.01)


def test_the_tracker_counts_storages_once_and_until_they_are_freed() -> None:
    kept = torch.zeros(100)
    with Tracker([kept]) as tracker:
        kept.add_(1)
        one = torch.ones(10, 10)
        view = one.t()[:5]
        assert tracker.now == Counter(other=400)
        tracker.label(view, "gradients")
        del one
        assert tracker.now["gradients"] == 400
        del view
        assert tracker.now.total() == 0
        assert tracker.peak.total() == 400
        a = torch.zeros(3, 5)
        _ = a @ a.T
        assert tracker.flops == 2 * 3 * 5 * 3


@pytest.mark.parametrize("scope", ["submodule", "block", "full"])
def test_more_of_anything_needs_no_less(llama: Shape, scope: Any) -> None:
    loss = "cross_entropy" if scope == "full" else "normalised"
    options = PlanOptions(scope, 2, 16, 8, 4, start="pruned", loss=loss)
    base = predict(llama, options).peak.total
    for option in ("batch_size", "seq_len"):
        assert predict(llama, replace(options, **{option: 2 * getattr(options, option)})).peak.total > base
    deeper = shape_of({**LLAMA, "num_hidden_layers": 2 * L})
    assert predict(deeper, options).peak.total > base
    more = predict(llama, replace(options, num_sequences=16))
    assert more.flops > predict(llama, options).flops
    assert (more.peak.total > base) == options.is_local


def test_offload_does_not_grow_with_depth(llama: Shape) -> None:
    deeper = shape_of({**LLAMA, "num_hidden_layers": 2 * L})
    for scope in ("matrix", "submodule", "block"):
        options = PlanOptions(scope, 2, 16, 8, 4, start="pruned", offload="host")
        snapshots = [{one.name: one.total for one in predict(shape, options).snapshots} for shape in (llama, deeper)]
        assert snapshots[0].keys() == snapshots[1].keys()
        for name in snapshots[0].keys() - {"embed"}:
            assert snapshots[1][name] == pytest.approx(snapshots[0][name], rel=0.02)
        on_host, on_disk = (predict(llama, replace(options, offload=place)) for place in ("host", "disk"))
        start = 4 * {"matrix": MATRICES, "submodule": 3 * D * H + D, "block": BLOCK}[scope]  # of the largest window
        assert on_host.host["weights"] == 4 * N + start
        assert on_disk.host["weights"] == 4 * (N - L * BLOCK) + start
        assert on_host.peak.held["weights"] == on_disk.peak.held["weights"] == 4 * BLOCK


@pytest.mark.parametrize("scope", ["matrix", "submodule", "block"])
def test_activations_are_where_they_are_put(llama: Shape, scope: Any) -> None:
    asked = PlanOptions(scope, 2, 16, 8, 4, start="pruned")
    copies = [8 * 16 * D * 4, 4 * 16 * D * 4] * (3 if scope == "submodule" else 2)  # calibration, then held out

    def placed(**options: Any) -> tuple[int, int, int]:
        found = predict(llama, replace(asked, **options))
        return found.peak.held["calibration"], found.host["calibration"], found.disk["activations"]

    assert placed() == (sum(copies), 0, 0)
    assert placed(activations="host") == (0, sum(copies), 0)
    assert placed(activations="disk") == (0, 0, sum(copies))
    assert placed(activations="auto", activations_budget=sum(copies)) == (sum(copies), 0, 0)
    assert placed(activations="auto", activations_budget=copies[0]) == (copies[0], sum(copies[1:]), 0)
    room = {"activations_budget": copies[1], "activations_host_budget": copies[0]}  # each for one copy alone
    assert placed(activations="auto", **room) == (copies[1], copies[0], sum(copies[2:]))
    assert placed(activations="host", activations_dtype=torch.bfloat16) == (0, sum(copies) // 2, 0)


def test_processes_that_recover_windows_of_their_own_share_the_time_but_not_the_memory(llama: Shape) -> None:
    options = PlanOptions("submodule", 2, 16, 8, 4, activations="disk")
    rates: dict[Kind, float] = dict.fromkeys(KINDS, 2.0**30)
    one = predict(llama, options, rates)
    two = predict(llama, replace(options, world_size=2), rates)
    apart = predict(llama, replace(options, world_size=2, num_nodes=2), rates)
    assert two.peak == one.peak
    assert two.host == {name: 2 * size for name, size in one.host.items()}
    assert apart.host == one.host
    assert two.disk == {**one.disk, "activations": 2 * one.disk["activations"]}
    assert two.flops_by_kind == one.flops_by_kind
    assert two.seconds == (one.flops_by_kind["walk"] + (one.flops - one.flops_by_kind["walk"]) / 2) / 2**30


def test_training_ends_with_the_last_token_or_step(llama: Shape) -> None:
    options = PlanOptions("full", 2, 16, 8, 4, epochs=2, start="pruned", loss="cross_entropy", accumulate=2)
    of_epochs = predict(llama, options).flops_by_kind
    assert predict(llama, replace(options, max_tokens=8 * 16)).flops_by_kind == of_epochs
    streamed = predict(llama, replace(options, max_tokens=24 * 16 + 15)).flops_by_kind
    assert streamed == {**of_epochs, "training": 3 * of_epochs["training"], "rest": 3 * of_epochs["rest"]}
    assert predict(llama, replace(options, max_steps=4)).flops_by_kind == of_epochs
    stopped = predict(llama, replace(options, max_steps=3)).flops_by_kind
    assert stopped == {kind: flops * (4 if kind == "held out" else 3) // 4 for kind, flops in of_epochs.items()}
    assert predict(llama, replace(options, max_steps=3, world_size=2)).flops_by_kind == of_epochs


def test_time_follows_the_rate(llama: Shape) -> None:
    options = PlanOptions("full", 2, 16, 8, 4, start="pruned", loss="cross_entropy", sharding="ddp", world_size=2)
    found = predict(llama, options, speed=2.0**30)
    assert found.seconds == found.flops / 2**31
    assert predict(llama, options).seconds is None
    assert found.flops_by_kind.keys() == {"training", "rest", "held out"}
    rates: dict[Kind, float] = {"training": 2.0**30, "rest": 2.0**31, "held out": 2.0**32}
    taken = (
        4 * found.flops_by_kind["training"] + 2 * found.flops_by_kind["rest"] + found.flops_by_kind["held out"]
    ) / 2**32
    assert predict(llama, options, rates).seconds == taken / 2


@pytest.mark.parametrize("scope", ["submodule", "block", "full"])
def test_proposals_fit_and_are_sorted(llama: Shape, scope: Any) -> None:
    loss = "cross_entropy" if scope == "full" else "normalised"
    options = PlanOptions(scope, 2, 64, 16, 4, start="pruned", loss=loss)
    if scope == "block":
        options = replace(options, num_blocks=2, precision="bf16-mixed")
    peak = predict(llama, options).peak.total
    assert propose(llama, options, peak) == []
    found = propose(llama, options, int(0.9 * peak))
    assert found
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    for one in found:
        changed = one.prediction.options
        assert one.arguments
        assert predict(llama, changed).peak.total == one.prediction.peak.total <= 0.9 * peak
        together = [each.batch_size * each.accumulate * each.world_size for each in (options, changed)]
        assert options.is_local or together[0] == together[1]
    assert propose(llama, options, 1000) == []


@pytest.mark.parametrize("activations", ["auto", "host"])
def test_a_model_whose_hidden_states_are_off_the_device_can_follow_them(llama: Shape, activations: Any) -> None:
    options = PlanOptions("block", 2, 16, 8, 4, activations=activations)
    memory = int(0.8 * predict(llama, options).peak.total)
    found = [one.arguments for one in propose(llama, options, memory) if one.kind == "offload"]
    assert found
    assert all(any("model.offload" in argument for argument in one) for one in found)
    assert not any("device" in " ".join(one) for one in found)


def test_what_cannot_be_planned_is_refused(llama: Shape) -> None:
    data = data_of()
    with pytest.raises(ValueError, match="got Pretraining"):
        PlanOptions.of(Pretraining(LLAMA), data)
    data.num["train"] = None
    with pytest.raises(ValueError, match=r"data\.num_sequences, got null"):
        PlanOptions.of(MatrixReconstruction(), data)
    with pytest.raises(ValueError, match="64-true"):
        PlanOptions("block", precision="64-true")
    with pytest.raises(ValueError, match="no pattern"):
        predict(llama, PlanOptions("block", masked=False))
