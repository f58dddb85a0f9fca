"""Local scopes on models that are on the host or on disk: the same bits, with one window on the device."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import MaskEnforcer
from recon.calibration.activations import Activations
from recon.calibration.storage import Storage
from recon.cli import main
from recon.evaluation.blockwise import evaluate_blockwise, measure_drift_blockwise
from recon.evaluation.drift import measure_drift
from recon.evaluation.perplexity import evaluate
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.models.offload.opening import open_offloaded
from recon.models.replay import Replay
from recon.models.windows import Windows
from recon.pruning.allocation import EqualErrors
from recon.pruning.criteria import SparseGPT
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import Pruning, prune
from recon.pruning.start_weights import amend_by
from recon.scopes import BlockDistillation, MatrixReconstruction, SubmoduleDistillation
from recon.scopes.local.module import LocalScope
from recon.scopes.local.window_state import Upcast
from recon.scopes.lora import Lora
from tests.support.families import DEPTH, tiny, token_ids
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    prepared,
    random_masks,
    same,
    save_tiny,
    trainer_of,
    untimed,
    weights_of,
)
from tests.support.scope_runs import Kill, Killed, Spy
from tests.support.slow import quick, slow

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

CPU = torch.device("cpu")
SHORT = {"epochs": 2, "lr": 3e-3, "batch_size": 4}
ENDS = [["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.gate_proj", "*.up_proj"], ["*.down_proj"]]
KINDS = {
    "matrix": lambda **o: MatrixReconstruction(batch_size=4, **o),
    "submodule": lambda **o: SubmoduleDistillation(**{**SHORT, **o}),
    "groups": lambda **o: SubmoduleDistillation(windows=Windows(ENDS), **{**SHORT, **o}),
    "lora": lambda **o: SubmoduleDistillation(parameters="lora", lora=Lora(rank=2), **{**SHORT, **o}),
    "block": lambda **o: BlockDistillation(**{**SHORT, **o}),
    "overlapping": lambda **o: BlockDistillation(num_blocks=2, stride=1, **{**SHORT, **o}),
}


class Resident(Callback):
    """What is on the device at every step, beside what the window under way needs."""

    def __init__(self) -> None:
        self.bytes: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        modules = [block.module for block in pl_module.window.blocks]
        needed = sum(p.numel() * 4 for one in modules for p in one.parameters())  # adapters, too
        needed += sum(b.nbytes for one in modules for b in one.buffers())
        self.bytes.append((pl_module.offloaded.device_bytes(), needed))


def fitted(scope: LocalScope, directory: Path, *callbacks: Callback, masks: Any = None, data: Any = None, **o: Any):
    """The results and weights of a fit, as they would be written."""
    directory.mkdir(exist_ok=True)
    scope.directory = directory
    prepared(scope, data, directory, masks or random_masks(tiny_of(scope)))
    trainer_of(MaskEnforcer(), *callbacks, **o).fit(scope)
    model, state = scope.result()
    return untimed(scope.results), {name: one.clone() for name, one in (state or model.state_dict()).items()}


def tiny_of(scope: LocalScope) -> Any:
    return tiny(Path(scope.source.name).name.removeprefix("dense-"))


def cases() -> list[Any]:
    every = [("llama", kind, "dense") for kind in KINDS]
    more = [("gpt2", "submodule", "dense"), ("phi", "submodule", "dense"), ("gpt_neox", "matrix", "dense")]
    passing = [("llama", kind, "recovered") for kind in ("matrix", "submodule", "overlapping")]
    return every + more + passing + [("llama", "submodule", "recovered_local"), ("llama", "block", "recovered_local")]


@pytest.mark.parametrize(("family", "kind", "propagation"), quick(cases(), *cases()[::3]))
def test_an_offloaded_model_is_recovered_to_the_same_bits(
    family: str, kind: str, propagation: str, tmp_path: Path
) -> None:
    options = {"name": save_tiny(family, tmp_path), "propagation": propagation}
    expected, weights = fitted(KINDS[kind](**options), tmp_path / "none")
    for offload in ("host", "disk"):
        resident, scope = Resident(), KINDS[kind](offload=offload, **options)
        results, found = fitted(scope, tmp_path / offload, resident)
        assert results == expected
        assert same(found, weights)
        assert not list(scope.parameters())
        assert scope.offloaded is not None
        assert scope.offloaded.device_bytes() == 0
        assert resident.bytes
        assert all(there == needed for there, needed in resident.bytes)


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize(("inputs", "allocation"), [("pruned", None), ("dense", EqualErrors())])
def test_an_offloaded_model_is_pruned_alike(inputs: Any, allocation: Any, offload: Any, tmp_path: Path) -> None:
    source, tokens = ModelSource(save_tiny("gpt2", tmp_path)), token_ids(6, 12)
    options = Pruning(inputs=inputs, batch_size=4, allocation=allocation)
    expected: dict[str, Tensor] = {}
    masks = prune(source.model(), tokens, SparseGPT(), Unstructured(0.5), options, moved=expected.__setitem__)
    offloaded = open_offloaded(source, offload, CPU)
    found: dict[str, Tensor] = {}

    def keep(name: str, weight: Tensor) -> None:
        found[name] = weight.clone()

    replay = Replay.within(offloaded)
    assert prune(offloaded.model, tokens, SparseGPT(), Unstructured(0.5), options, moved=keep, replay=replay) == masks
    assert same(found, expected)
    replay.hold(())
    if offload == "host":
        assert same(weights_of(offloaded.model), weights_of(source.model()))


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_a_walk_has_one_block_on_the_device(offload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = open_offloaded(ModelSource(save_tiny("llama", tmp_path)), offload, CPU)
    block = sum(p.nbytes for p in offloaded.anatomy.blocks[0].module.parameters())
    seen = []
    run = Replay.run

    def counting(replay: Replay, index: int, hidden: Tensor) -> Tensor:
        output = run(replay, index, hidden)
        seen.append(offloaded.device_bytes())
        return output

    monkeypatch.setattr(Replay, "run", counting)
    replay = Replay.within(offloaded)
    walk = Activations(replay, token_ids(5, 12), 2, CPU)
    for index in range(DEPTH):
        walk.enter([index])
    assert set(seen) == {block}
    replay.hold([0, 1])
    replay.run(2, walk.hidden)
    assert offloaded.device_bytes() == 3 * block
    replay.keep([1])
    assert offloaded.device_bytes() == block
    with replay.rest_onloaded():
        outside = sum(p.nbytes for p in offloaded.model.parameters()) - DEPTH * block
        assert offloaded.device_bytes() >= block + outside
    replay.hold(())
    assert offloaded.device_bytes() == 0


def test_a_model_on_disk_has_no_weights_of_blocks_until_they_are_needed(tmp_path: Path) -> None:
    offloaded = open_offloaded(ModelSource(save_tiny("llama", tmp_path)), "disk", CPU)
    parameters = [one for block in offloaded.anatomy.blocks for one in block.parameters().values()]
    assert all(one.untyped_storage().nbytes() == one.element_size() for one in parameters)
    assert all(one.isnan().all() for one in parameters)
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        parameters[0].copy_(torch.ones(parameters[0].shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox", "opt", "gemma3_text", "bloom"])
def test_a_model_read_from_disk_is_the_one_that_transformers_loads(family: str, dtype: str, tmp_path: Path) -> None:
    source = ModelSource(save_tiny(family, tmp_path), dtype=dtype)
    model, offloaded = source.model(), open_offloaded(source, "disk", CPU)
    state = offloaded.state(None, tmp_path)
    assert same(state, model.state_dict())
    assert [one.dtype for one in state.values()] == [one.dtype for one in model.state_dict().values()]
    assert same(dict(offloaded.model.named_buffers()), dict(model.named_buffers()))
    replay, tokens = Replay.within(offloaded), token_ids()
    with torch.no_grad():
        hidden = replay.embed(tokens)
        for index in range(DEPTH):
            hidden = replay.run(index, hidden)
        assert torch.equal(replay.head(tokens, hidden), model(tokens, use_cache=False).logits)


def test_several_shards_are_read_and_a_missing_weight_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    source = ModelSource(str(tmp_path / "shards"))
    assert same(open_offloaded(source, "disk", CPU).state(None, tmp_path), model.state_dict())
    index = tmp_path / "shards" / "model.safetensors.index.json"
    name = "model.layers.1.mlp.up_proj.weight"
    places = json.loads(index.read_text())
    places["weight_map"].pop(name)
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+, {name} the first; .* model.offload: host"):
        open_offloaded(source, "disk", CPU)
    index.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors or the files in .* has neither"):
        open_offloaded(source, "disk", CPU)


@pytest.mark.parametrize(
    ("kind", "propagation", "dtype", "offload"),
    [
        *(slow("submodule", "dense", "float32", offload) for offload in ("host", "disk")),
        slow("groups", "dense", "float32", "host"),
        ("groups", "dense", "float32", "disk"),
        ("block", "recovered", "bfloat16", "host"),
        slow("block", "recovered", "bfloat16", "disk"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, propagation: str, dtype: str, offload: str, tmp_path: Path
) -> None:
    options = {"name": save_tiny("llama", tmp_path), "propagation": propagation, "dtype": dtype}
    expected, weights = fitted(KINDS[kind](**options), tmp_path / "none")
    names = list(expected)
    for killed in (names[1], names[-1]):
        with pytest.raises(Killed):
            fitted(KINDS[kind](offload=offload, **options), tmp_path / offload, Kill(killed, 3))
        assert not (tmp_path / offload / "windows" / f"{killed}.safetensors").exists()
    spy = Spy()
    results, found = fitted(KINDS[kind](offload=offload, **options), tmp_path / offload, spy)
    assert set(spy.windows) == {names[-1]}
    assert results == expected
    assert same(found, weights)
    (tmp_path / offload / "windows" / f"{names[0]}.safetensors").unlink()  # those behind it are taken in at the end
    results, found = fitted(KINDS[kind](offload=offload, **options), tmp_path / offload)
    assert results == expected or propagation != "dense"
    assert same(found, weights)


# --- precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["none", slow("host"), "disk"])
@pytest.mark.parametrize("kind", ["submodule", "block"])
def test_a_bf16_model_is_trained_in_fp32(kind: str, offload: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    options = {"name": name, "start": "pruned", "epochs": 4, "lr": 1e-3, "save_dtype": "bfloat16"}

    seen: set[Any] = set()

    class Dtypes(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.update(one.dtype for group in trainer.optimizers[0].param_groups for one in group["params"])

    wide, _ = fitted(KINDS[kind](**options), tmp_path / "fp32")
    results, weights = fitted(KINDS[kind](dtype="bfloat16", offload=offload, **options), tmp_path / "bf16", Dtypes())
    assert seen == {torch.float32}
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert results.keys() == wide.keys()
    for window, result in results.items():
        assert result["after"] == pytest.approx(wide[window]["after"], rel=0.03), window


def test_that_is_better_than_training_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"name": save_tiny("llama", tmp_path), "start": "pruned", "epochs": 8, "lr": 3e-4, "dtype": "bfloat16"}
    ours, _ = fitted(KINDS["block"](**options), tmp_path / "fp32")
    monkeypatch.setattr(Upcast, "upcast", lambda self, blocks: None)
    plain, _ = fitted(KINDS["block"](**options), tmp_path / "bf16")
    assert all(ours[name]["after"] < plain[name]["after"] for name in plain)


@pytest.mark.parametrize("offload", ["none", "host"])
def test_the_trainers_own_16_bit_precision_is_no_obstacle(offload: str, tmp_path: Path) -> None:
    scope = KINDS["submodule"](name=save_tiny("llama", tmp_path), offload=offload)
    results, _ = fitted(scope, tmp_path / "run", precision="bf16-true")
    assert all(one["after"] < one["before"] for one in results.values())


def test_hidden_states_are_kept_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny("llama")
    replay = Replay(model, Anatomy.of(model))
    walks = [
        Activations(replay, token_ids(5, 12), 2, CPU, tap=True, storage=storage)
        for storage in (Storage(), Storage("host", torch.bfloat16))
    ]
    for index in range(DEPTH):
        for walk in walks:
            walk.enter([index])
        exact, rounded = walks
        for name in ("hidden", "attention", "output"):
            assert getattr(rounded, name).dtype == torch.bfloat16
            loaded = rounded.load(getattr(rounded, name), slice(1, 4))
            assert loaded.dtype == torch.float32
            torch.testing.assert_close(loaded, getattr(exact, name)[1:4], rtol=3e-2, atol=3e-2)
    narrow, _ = fitted(
        KINDS["submodule"](name=save_tiny("llama", tmp_path), activations="host", activations_dtype="bfloat16"),
        tmp_path / "narrow",
    )
    wide, _ = fitted(KINDS["submodule"](name=save_tiny("llama", tmp_path)), tmp_path / "wide")
    assert all(narrow[name]["after"] == pytest.approx(wide[name]["after"], rel=0.05) for name in wide)


@pytest.mark.parametrize(("kind", "micro"), [("submodule", 1), ("block", 1), ("block", 4)])
def test_accumulated_micro_batches_are_one_batch(kind: str, micro: int, tmp_path: Path) -> None:
    # Of `mse`, the mean over a batch is that of its parts; `normalised` weights each part by its own energy.
    options = {"name": save_tiny("llama", tmp_path), "loss": "mse", "epochs": 2, "start": "pruned"}
    _, weights = fitted(KINDS[kind](**{**options, "batch_size": 8}), tmp_path / "whole", data=data_of(num=16))
    _, found = fitted(
        KINDS[kind](**{**options, "batch_size": micro}),
        tmp_path / "parts",
        data=data_of(num=16),
        accumulate_grad_batches=8 // micro,
    )
    moved = weights_of(tiny("llama"))
    for name, weight in weights.items():
        error, way = (found[name] - weight).norm(), (weight - moved[name]).norm()
        assert error <= 2e-3 * way, name


# --- perplexity and drift -----------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_perplexity_and_drift_block_by_block_are_those_of_the_whole_model(
    family: str, offload: Any, tmp_path: Path
) -> None:
    source, ids = ModelSource(save_tiny(family, tmp_path)), token_ids(7, 16)
    loader = DataLoader([{"input_ids": row} for row in ids], batch_size=3)  # pyright: ignore[reportArgumentType]
    dense, pruned = source.model(), source.model()
    masks = random_masks(pruned)
    masks.apply(pruned)
    replays = [Replay.within(open_offloaded(source, offload, CPU)) for _ in range(2)]
    assert replays[1].offloaded is not None
    replays[1].offloaded.amend = amend_by(masks, None, replays[1].offloaded)
    for model, replay in zip((dense, pruned), replays, strict=True):
        expected, found = evaluate(model, loader), evaluate_blockwise(replay, ids, 3)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert found.protocol == expected.protocol
        assert replay.offloaded is not None
        assert replay.offloaded.device_bytes() == 0
    expected, found = measure_drift(dense, pruned, loader), measure_drift_blockwise(*replays, ids, 3)
    assert found.hidden == pytest.approx(expected.hidden, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert (found.split, found.num_sequences, found.seq_len) == ("validation", 7, 16)


# --- the command --------------------------------------------------------------------------------------

SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, "
    "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}"
)
DATA = [
    *("--data.num_sequences=6", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=5"),
    *("--data.batch_size=2", "--model.batch_size=2", "--model.epochs=1", "--summary=false"),
    *("--trainer.accelerator=cpu", "--model.name=random", "--model.shape", SHAPE),
]


@pytest.mark.slow
def test_a_run_reports_and_writes_the_same_wherever_the_model_is(tmp_path: Path) -> None:
    reports, written = {}, {}
    for offload in ("none", "host", "disk"):
        run = tmp_path / offload
        options = ["--model.offload", offload, "--model.propagation=recovered", "--pruning.inputs=recovered"]
        assert main(["fit", "-c", "scopes/submodule", "--run_dir", str(run), *DATA, *options]) == 0
        reports[offload] = json.loads((run / "report.json").read_text())
        written[offload] = load_file(run / "model" / "model.safetensors")
        assert not (run / "dense").exists()
    for offload in ("host", "disk"):
        assert same(written[offload], written["none"])
        for name in ("perplexity", "dense_perplexity", "pruned_perplexity"):
            assert reports[offload][name] == pytest.approx(reports["none"][name], rel=1e-5)
        assert reports[offload]["mask_violations"] == 0
        assert reports[offload]["drift"]["kl"] == pytest.approx(reports["none"]["drift"]["kl"], rel=1e-4)
        assert reports[offload]["drift"]["hidden"] == pytest.approx(reports["none"]["drift"]["hidden"], rel=1e-4)


def test_what_cannot_be_is_refused_with_a_cure(tmp_path: Path) -> None:
    scope = KINDS["block"](name=save_tiny("llama", tmp_path), offload="disk")
    with pytest.raises(ValueError, match="got no run directory"):
        prepared(scope)
    shape = {"model_type": "llama", "vocab_size": 96}
    with pytest.raises(ValueError, match="got no directory"):
        open_offloaded(ModelSource("random", shape), "disk", CPU)
