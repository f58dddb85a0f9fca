"""Pruning and measuring models that are on the host or on disk, one block on the device at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import MemoryProfiler
from recon.experiment.baselines import measure, measure_pruned
from recon.experiment.directory import RunDirectory
from recon.experiment.options import RunOptions
from recon.models.loading import ModelSource
from recon.profiling.phases import PhaseName
from recon.pruning.criteria import SparseGPT
from recon.pruning.masks import Masks
from recon.pruning.patterns import Unstructured
from recon.pruning.prune import Pruning
from recon.report import Report
from recon.scopes import FullRetraining
from tests.support.scope_fixtures import IGNORED, data_of, same, save_tiny
from tests.support.simulated.runs import run, run_on_device, weights_in
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]

CPU = torch.device("cpu")
OPTIONS = RunOptions(SparseGPT(), Unstructured(0.5), Pruning(inputs="pruned", batch_size=4))
FIGURES = ("perplexity", "dense_perplexity", "sparsity", "model_sparsity", "mask_violations")


def require_alike(found: Report, expected: Report) -> None:
    for figure in FIGURES:
        value, other = getattr(found, figure), getattr(expected, figure)
        assert value == other or value == pytest.approx(other, rel=1e-5), figure
    assert (found.scope, found.references) == (expected.scope, expected.references)
    assert found.drift.get("kl", 0.0) == pytest.approx(expected.drift.get("kl", 0.0), rel=1e-4)


def pruned(source: ModelSource, path: Path, offload: Any, keep_model: bool, options: RunOptions = OPTIONS) -> Report:
    return measure_pruned(source, data_of(), RunDirectory(path, {}), options, CPU, keep_model, offload)


@pytest.mark.parametrize(("offload", "family"), [("host", "gpt2"), slow("disk", "llama")])
def test_pruning_and_testing_block_by_block_are_those_of_whole_models(
    offload: Any, family: str, tmp_path: Path
) -> None:
    source = ModelSource(
        save_tiny(family, tmp_path / "model", **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2})
    )
    keep_model = family == "llama"
    expected = pruned(source, tmp_path / "none", "none", keep_model)
    found = pruned(source, tmp_path / offload, offload, keep_model)
    require_alike(found, expected)
    masks = Masks.load(tmp_path / offload / "masks.safetensors")
    assert masks == Masks.load(tmp_path / "none" / "masks.safetensors")
    if keep_model:
        assert same(weights_in(tmp_path / offload), weights_in(tmp_path / "none"))
    require_alike(measure(source, data_of(), CPU, masks, offload=offload), measure(source, data_of(), CPU, masks))
    if keep_model:
        written = source.at(tmp_path / offload / "model")
        tested = measure(written, data_of(), CPU, promised=masks, offload=offload)
        require_alike(tested, measure(written, data_of(), CPU, promised=masks))
        assert (tested.scope, tested.mask_violations) == ("sparse", 0)


def test_a_random_model_is_read_from_disk_and_leaves_nothing(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    source, options = ModelSource("random", shape), replace(OPTIONS, drift=False)
    found, expected = (pruned(source, tmp_path / one, one, False, options) for one in ("disk", "none"))
    require_alike(found, expected)
    assert not (tmp_path / "disk" / "dense").exists()
    tested = measure(source, data_of(), CPU, offload="disk")
    assert tested.perplexity == pytest.approx(expected.dense_perplexity, rel=1e-5)


OPTIONS_OF_FULL = {
    "exact, by distillation": {"start": "exact", "loss": "distillation"},
    "moved, adapters": {"start": "moved", "parameters": "lora"},
}


@pytest.mark.parametrize(("offload", "options"), [*zip(("host", "disk"), OPTIONS_OF_FULL, strict=True)])
def test_full_retraining_ends_at_the_same_bits_if_all_but_its_fit_is_offloaded(
    offload: Any, options: str, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"name": save_tiny("llama", tmp_path, num_hidden_layers=2), "epochs": 1}
    chosen |= OPTIONS_OF_FULL[options]
    whole, offloaded = (tmp_path / one for one in ("none", offload))
    expected = run(FullRetraining(**chosen), whole, CPU, OPTIONS)
    found = run(FullRetraining(**chosen, offload=offload), offloaded, CPU, OPTIONS)
    assert Masks.load(offloaded / "masks.safetensors") == Masks.load(whole / "masks.safetensors")
    assert same(weights_in(offloaded), weights_in(whole))
    require_alike(found, expected)
    assert found.pruned_perplexity == pytest.approx(expected.pruned_perplexity, rel=1e-5)


def test_only_the_fit_of_full_retraining_has_the_model_on_the_device(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path, num_hidden_layers=4)
    profiler = MemoryProfiler(print_table=False)
    scope = FullRetraining(name=name, epochs=1, offload="host", start="exact")
    run_on_device(scope, tmp_path / "run", OPTIONS, profiler)
    whole = sum(one.nbytes for one in ModelSource(name).model().parameters())
    weights = {phase["phase"]: phase["categories"]["device"]["weights"] for phase in profiler.phases}
    assert weights.pop("train") >= whole
    measured = (PhaseName.PRUNE, PhaseName.BASELINES, PhaseName.START, PhaseName.EVALUATE, PhaseName.DRIFT)
    assert set(measured) <= weights.keys()
    assert max(weights.values()) < whole / 2, weights
