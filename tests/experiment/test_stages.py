"""Recoveries that start from another run: exact counts, the same bits, resume, refusals; soups; recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.basics.manifest import Entry
from recon.basics.run_paths import RunPaths
from recon.experiment.origin import Origin, RunWeights
from recon.experiment.recipes import Recipe, lay_out
from recon.experiment.soup import average, chosen
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, SubmoduleDistillation
from tests.support.scope_fixtures import data_of, random_masks, same, save_tiny, trainer_of, untimed, weights_of
from tests.support.slow import quick

KINDS = (MatrixReconstruction, SubmoduleDistillation, BlockDistillation, FullRetraining)


def two_of_four(model: Any) -> Masks:
    """Masks that keep the two largest of four."""
    keep = {name: NM(2, 4).select(model.get_parameter(name).detach().abs(), name) for name in random_masks(model)}
    return Masks(keep)


def begun_from(model: Any, masks: Masks, only_masked: bool) -> dict[str, Tensor]:
    """Weights that another run might have: those of the dense blocks, moved a little, and zero where pruned."""
    generator = torch.Generator().manual_seed(7)
    start = {}
    for name, weight in weights_of(model).items():
        moves = name in masks or (not only_masked and ".layers." in name)
        start[name] = weight + 0.01 * torch.randn(weight.shape, generator=generator) if moves else weight
        if name in masks:
            start[name][~masks[name]] = 0
    return start


def continued(kind: Any, path: Path, directory: Path | None = None, stop: bool = False, **options: Any) -> Any:
    """A scope that has gone on from given weights with 2:4 masks, and these weights."""
    options = {} if kind is MatrixReconstruction else {"epochs": 1, "lr": 1e-3, **options}
    scope, data = kind(name=save_tiny("llama", path), start="run", **options), data_of()
    scope.load(data)
    masks = two_of_four(scope.model)
    start = begun_from(scope.model, masks, only_masked=kind is MatrixReconstruction)
    scope.prepare(data, masks, directory, start)
    trainer = trainer_of()
    if stop:
        begin_next = scope._begin_next

        def broken() -> Any:
            if len(scope.results) == 2:
                raise RuntimeError("the test says stop")
            return begin_next()

        scope._begin_next = broken
    trainer.fit(scope, datamodule=scope.fit_data(data))
    return scope, masks, start


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", quick(KINDS, MatrixReconstruction, BlockDistillation))
def test_a_scope_goes_on_under_the_masks(kind: Any, tmp_path: Path) -> None:
    scope, masks, start = continued(kind, tmp_path)
    found = weights_of(scope.model)
    assert masks.violations(scope.model) == 0
    for name in masks:
        kept = (found[name] != 0).view(-1, 4).sum(1)
        assert kept.max() <= 2
        assert not torch.equal(found[name], start[name])
    outside = [name for name in start if ".layers." not in name]
    assert outside
    assert all(torch.equal(found[name], start[name]) for name in outside)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", quick(KINDS[1:], SubmoduleDistillation, FullRetraining))
def test_a_rate_of_nothing_leaves_the_weights_of_the_run(kind: Any, tmp_path: Path) -> None:
    """Norms too: what the run has changed without a mask comes along."""
    scope, _, start = continued(kind, tmp_path, lr=1e-30)
    for name, weight in weights_of(scope.model).items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("propagation", quick(["dense", "recovered"], "recovered"))
def test_overlapping_windows_take_the_run_once(propagation: Any, tmp_path: Path) -> None:
    scope, _, start = continued(BlockDistillation, tmp_path, num_blocks=2, stride=1, lr=1e-30, propagation=propagation)
    assert all(torch.allclose(one, start[name], rtol=0, atol=1e-12) for name, one in weights_of(scope.model).items())


@pytest.mark.filterwarnings("ignore")
def test_a_killed_stage_ends_at_the_same_bits(tmp_path: Path) -> None:
    straight, *_ = continued(SubmoduleDistillation, tmp_path, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="the test says stop"):
        continued(SubmoduleDistillation, tmp_path, tmp_path / "killed", stop=True)
    assert len(list((tmp_path / "killed" / "windows").iterdir())) == 2
    resumed, *_ = continued(SubmoduleDistillation, tmp_path, tmp_path / "killed")
    assert same(weights_of(straight.model), weights_of(resumed.model))
    assert untimed(straight.results) == untimed(resumed.results)


@pytest.mark.parametrize(("kind", "name"), [(BlockDistillation, "model.norm.weight"), (MatrixReconstruction, "norm")])
def test_a_run_that_changed_more_than_the_scope_recovers_is_refused(kind: Any, name: str, tmp_path: Path) -> None:
    scope, data = kind(name=save_tiny("llama", tmp_path), start="run"), data_of()
    scope.load(data)
    masks = two_of_four(scope.model)
    start = begun_from(scope.model, masks, only_masked=False)
    start["model.norm.weight"] = start["model.norm.weight"] + 1
    with pytest.raises(ValueError, match=rf"the {scope.scope} scope leaves .*{name}.* as it is in the dense model"):
        scope.prepare(data, masks, None, start)


def test_a_run_to_start_from_has_to_be_named(tmp_path: Path) -> None:
    scope, data = BlockDistillation(name=save_tiny("llama", tmp_path), start="run"), data_of()
    scope.load(data)
    with pytest.raises(ValueError, match="--from runs/x"):
        scope.prepare(data, two_of_four(scope.model))


def test_weights_of_a_run_are_those_of_its_files(tmp_path: Path) -> None:
    model = ModelSource(save_tiny("llama", tmp_path)).model()
    held = RunWeights(Path(save_tiny("llama", tmp_path)), model)
    assert same(dict(held), weights_of(model))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"--from reads model.safetensors or"):
        RunWeights(tmp_path / "other", model)


# --- soups ------------------------------------------------------------------------------------------------


def models(
    path: Path, num: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Path], Masks, list[dict[str, Tensor]]]:
    """Directories of models that share 2:4 masks and their embeddings, the masks, and the weights."""
    dense = Path(save_tiny("llama", path))
    masks = two_of_four(ModelSource(str(dense)).model())
    found, states = [], []
    for seed in range(num):
        generator, state = torch.Generator().manual_seed(seed), load_file(dense / "model.safetensors")
        for name in masks:
            state[name] = torch.where(masks[name], torch.randn(state[name].shape, generator=generator), 0.0)
        state = {name: weight.to(dtype) for name, weight in state.items()}
        (path / f"model-{seed}").mkdir()
        save_file(state, path / f"model-{seed}" / "model.safetensors", {"format": "pt"})
        (path / f"model-{seed}" / "config.json").write_text((dense / "config.json").read_text())
        found, states = [*found, path / f"model-{seed}"], [*states, state]
    return found, masks, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_is_the_mean_under_the_masks(dtype: torch.dtype, tmp_path: Path) -> None:
    directories, masks, states = models(tmp_path, 3, dtype)
    average(directories, tmp_path / "soup")
    found = load_file(tmp_path / "soup" / "model.safetensors")
    assert found.keys() == states[0].keys()
    for name, weight in found.items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert weight.dtype == dtype
        if name in masks:
            assert not weight[~masks[name]].any()
            assert int((weight != 0).view(-1, 4).sum(1).max()) <= 2
        else:  # the same in all: not a bit may move
            assert torch.equal(weight, states[0][name])
    assert masks.violations_in(tmp_path / "soup") == 0
    assert (tmp_path / "soup" / "config.json").is_file()
    average(directories, tmp_path / "again")
    assert same(found, load_file(tmp_path / "again" / "model.safetensors"))


def test_models_with_other_weights_are_no_soup(tmp_path: Path) -> None:
    directories, _, states = models(tmp_path, 2)
    name = next(name for name in states[1] if name.endswith("q_proj.weight"))
    save_file({**states[1], name: states[1][name][:4].clone()}, directories[1] / "model.safetensors")
    with pytest.raises(ValueError, match=f"weights of one shape, got .* for {name}"):
        average(directories, tmp_path / "soup")
    del states[1][name]
    save_file(states[1], directories[1] / "model.safetensors")
    with pytest.raises(ValueError, match=f"the same weights, got {name} in"):
        average(directories, tmp_path / "soup")


def test_a_greedy_soup_takes_what_makes_it_no_worse(tmp_path: Path) -> None:
    directories, _, states = models(tmp_path, 3)
    target = {name: (states[0][name] + states[2][name]) / 2 for name in states[0]}

    def distance(directory: Path) -> float:
        state = load_file(directory / "model.safetensors")
        return sum(float((state[name] - one).square().sum()) for name, one in target.items())

    taken, alone = chosen(directories, distance, tmp_path / "candidate")
    assert taken == [0, 2]
    assert len(alone) == 3
    assert not (tmp_path / "candidate").exists()


# --- recipes ----------------------------------------------------------------------------------------------

CONTENT = {
    "options": {"criterion": "alps"},
    "stages": [
        {"config": "scopes/block", "options": {"model.num_blocks": 2}},
        {"config": ["scopes/full"], "num_seeds": 2, "weights": "greedy"},
    ],
}


def test_stages_are_commands_each_from_the_one_before() -> None:
    first, last = lay_out(Recipe.of("mine", CONTENT), ["--pattern=2:4"], 3, Path("runs/r"))
    (block,) = first.recoveries
    assert block.command[:5] == ["fit", "-c", "cell", "-c", "scopes/block"]
    assert {"--criterion=alps", "--model.num_blocks=2", "--pattern=2:4", "--seed_everything=3"} <= {*block.command}
    assert not any(one.startswith("--from") for one in block.command)
    assert first.result == block
    assert [cell.directory.name for cell in last.cells] == ["2-full-seed3", "2-full-seed4", "2-full-soup"]
    assert all("--from=runs/r/1-block" in cell.command for cell in last.recoveries)
    assert last.result.command[:3] == ["soup", "runs/r/2-full-seed3", "runs/r/2-full-seed4"]
    assert "--weights=greedy" in last.result.command


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"stages": []}, "needs a list of stages"),
        ({"stages": [{"config": "scopes/block"}], "seeds": 2}, "needs stages and options, got seeds"),
        ({"stages": [{"options": {}}]}, "stage 1: a stage needs its config"),
        ({"stages": [{"config": "scopes/block", "epochs": 2}]}, "stage 1: a stage has .*got epochs"),
        ({"stages": [{"config": "a"}, {"config": "b", "num_seeds": 0}]}, "stage 2: num_seeds needs a number from 1"),
        ({"stages": [{"config": "a", "weights": "all"}]}, "weights needs one of uniform, greedy, got 'all'"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe.of("mine", content)


def test_an_origin_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which does not exist"):
        Origin(tmp_path / "none").require()
    run = RunPaths(tmp_path / "run")
    run.path.mkdir()
    with pytest.raises(ValueError, match=r"without report.json; let it end"):
        Origin(run.path).require()
    for product in (run.report, run.masks, run.fingerprint_file, run.model / "model.safetensors"):
        product.parent.mkdir(exist_ok=True)
        product.write_text(json.dumps({"model": {"files": "abc", "dtype": "float32"}}))
        run.manifest.record({product: Entry.of(product)})
    Origin(run.path).require()
    Origin(run.path).require_same_model({"files": "abc"})
    with pytest.raises(ValueError, match="which pruned files abc, not files def"):
        Origin(run.path).require_same_model({"files": "def"})
    (run.model / "model.safetensors").write_text("damaged")
    with pytest.raises(ValueError, match="damaged"):
        Origin(run.path).require()
