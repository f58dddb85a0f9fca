"""Predicted peaks of the evaluations before and after the fit, against live bytes on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from recon.cli import main
from recon.evaluation.drift import measure_drift
from recon.evaluation.perplexity import evaluate
from recon.models.loading import ModelSource
from recon.planner import PlanOptions, Shape, predict, propose
from recon.planner.fake.tracker import Tracker
from recon.profiling.phases import PhaseName
from tests.support.scope_fixtures import IGNORED
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
OPTIONS: dict[str, Any] = {"evaluates": True, "baselines": True, "drift": True, "start": "pruned", "loss": "normalised"}
PHASES = {"baselines": PhaseName.BASELINES, "evaluate": PhaseName.EVALUATE, "drift": PhaseName.DRIFT}


@pytest.fixture(scope="module")
def llama() -> Shape:
    return Shape(ModelSource("random", LLAMA))


def planned(shape: Shape, scope: Any = "submodule", **options: Any) -> dict[str, Any]:
    """Name of each snapshot -> what it holds."""
    found = predict(shape, PlanOptions(scope, **OPTIONS | {"seq_len": 32, "num_sequences": 8} | options))
    return {one.name: one.held for one in found.snapshots}


@pytest.mark.parametrize("num", [4, 10], ids=["one batch", "several batches"])
def test_evaluations_hold_what_real_ones_hold(num: int, llama: Shape) -> None:
    """However many batches there are: one has let go of its logits before those of the next are computed."""
    models = [ModelSource("random", LLAMA, seed=seed).model() for seed in (0, 1)]
    batches = DataLoader([{"input_ids": row} for row in torch.arange(num * 32).reshape(num, 32)], batch_size=4)  # pyright: ignore[reportArgumentType]
    with Tracker([one for model in models for one in (*model.parameters(), *model.buffers())]) as tracker:
        evaluate(models[0], batches)
        scored = tracker.peak.total()
        tracker.reset()
        measure_drift(*models, batches)
        compared = tracker.peak.total()
    found = planned(llama, num_test=num, num_validation=num, evaluation_batch_size=4)
    assert found["evaluate"]["other"] == pytest.approx(scored, rel=0.05)
    assert found["drift"]["other"] == pytest.approx(compared, rel=0.05)


@pytest.mark.parametrize(
    "args",
    [
        slow(["-c", "scopes/submodule"]),
        ["-c", "scopes/submodule", "--model.offload", "host"],
        slow(["-c", "scopes/full"]),
    ],
    ids=["submodule", "offloaded", "full"],
)
def test_a_whole_run_holds_what_is_predicted(args: list[str], tmp_path: Path, capsys: Any) -> None:
    sizes = ["--data.num_sequences=4", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=4"]
    args = [*args, *sizes, "--model.name", "random", "--model.shape", json.dumps(LLAMA), "--model.epochs", "1"]
    args += ["--data.batch_size", "4", "--drift", "true", "--trainer.accelerator", "cpu"]
    assert main(["fit", *args, "--summary", "false", "--run_dir", str(tmp_path)]) == 0
    phases = json.loads((tmp_path / "memory.json").read_text())["phases"]
    measured = {one["phase"]: sum(one["categories"]["device"].values()) for one in phases}
    capsys.readouterr()
    scope = args[1].partition("/")[2]
    assert main(["plan", *args, "--scopes", f"[{scope}]", "--json", "true"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out[out.index("{") :])["scopes"]
    for name, phase in PHASES.items():
        assert row["moments"][name] == pytest.approx(measured[phase], rel=0.1), name
    assert row["peak_bytes"] == max(row["moments"].values())


def test_copies_on_a_gpu(llama: Shape) -> None:
    """The scope's own model is there before the fit, and on the host after it."""
    whole = 4 * llama.num_parameters
    found = planned(llama)
    copies = {name: found[name]["weights"] // whole for name in PHASES}
    assert copies == {"baselines": 2, "evaluate": 1, "drift": 2}
    assert planned(llama, baselines=False, drift=False).keys() & PHASES.keys() == {"evaluate"}
    assert not planned(llama, evaluates=False).keys() & PHASES.keys()
    half = planned(llama, dtype=torch.bfloat16)
    assert half["baselines"]["weights"] == pytest.approx(whole, rel=1e-3)


def test_offloaded_models_are_evaluated_in_parts(llama: Shape) -> None:
    outside = 4 * 2 * 2048 * 64
    found = planned(llama, offload="host", num_test=10, num_validation=6)
    assert found["evaluate"]["weights"] == pytest.approx(outside, rel=1e-3)
    assert found["drift"]["weights"] == 2 * found["evaluate"]["weights"]
    assert found["evaluate"]["calibration"] == 2 * 10 * 32 * 64 * 4
    assert planned(llama, offload="host", activations="disk", num_test=10)["evaluate"]["calibration"] == 0


def test_offloaded_full_retraining_is_whole_in_its_fit_alone(llama: Shape) -> None:
    given: dict[str, Any] = {"loss": "cross_entropy", "start": "exact", "num_test": 10, "num_validation": 6}
    whole = planned(llama, "full", **given)
    found = planned(llama, "full", **given, offload="host", activations="host")
    assert found.keys() == whole.keys()
    for name in ("forward", "backward", "step"):
        assert found[name] == whole[name]
    for name in ("baselines", "evaluate", "drift", "collect", "solve"):
        assert found[name]["weights"] < whole[name]["weights"], name
        assert found[name]["calibration"] == 0
    options = PlanOptions("full", **OPTIONS | {"seq_len": 32, "num_sequences": 8} | given, activations="host")
    on_host, on_disk = (predict(llama, replace(options, offload=place)).host for place in ("host", "disk"))
    assert on_host["weights"] == 2 * on_disk["weights"] == 2 * 4 * llama.num_parameters
    assert on_host["calibration"] == 4 * 6 * 32 * 64 * 4


def test_a_partitioned_model_is_whole_nowhere(llama: Shape) -> None:
    options = PlanOptions("full", 2, 16, 8, 4, **OPTIONS | {"loss": "cross_entropy"}, precision="bf16-mixed")
    options = replace(options, sharding="zero3", world_size=4)
    whole, parts = (predict(llama, replace(options, partitioned=one)) for one in (False, True))
    assert whole.host["weights"] == 4 * 4 * llama.num_parameters
    assert parts.host["weights"] == 0
    assert {one.name for one in whole.snapshots} - {one.name for one in parts.snapshots} == PHASES.keys()
    offloaded = predict(llama, replace(options, partitioned=True, offload_optimizer=True, offload_parameters=True))
    assert offloaded.host["weights"] == pytest.approx(2 * llama.num_parameters, rel=1e-3)


def test_a_proposal_may_measure_less(llama: Shape) -> None:
    options = PlanOptions("submodule", 1, 8, 2, 2, **OPTIONS, precision="bf16-mixed", dtype=torch.float32)
    fit = predict(llama, replace(options, evaluates=False)).peak.total
    memory = max(fit, predict(llama, replace(options, baselines=False, drift=False)).peak.total)
    assert predict(llama, options).peak.total > memory
    arguments = [one.arguments for one in propose(llama, options, memory) if one.kind == "the same device"]
    assert arguments == [["--baselines false", "--drift false"]]
