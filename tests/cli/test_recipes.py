"""Recipes as a user gives them: stages run, resumed, reported, verified, refused, and chosen by limits."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from recon.cli import main
from recon.experiment.comparison import cell as cells
from recon.experiment.origin import Origin
from recon.experiment.verification import verify
from recon.planner import PlanOptions, Prediction, Snapshot
from recon.planner.recipes import RecipeNeeds, choose
from recon.pruning.masks import Masks
from recon.report import Report, Results
from tests.support.scope_fixtures import same
from tests.support.shapes import LLAMA, random_model

MODEL = [*random_model(LLAMA), "--trainer.accelerator=cpu"]
DATA = ["--data.num_sequences=8", "--data.seq_len=16", "--data.num_validation=4", "--data.num_test=4"]
RECIPE = """
options: {pattern: 2:4, model.lr: 1.0e-3, model.epochs: 1, trainer.logger: false}
stages:
  - config: scopes/block
    options: {criterion: magnitude, model.start: pruned}
  - config: scopes/full
    options: {model.loss: distillation}
    num_seeds: 2
"""


def recipe(path: Path, text: str = RECIPE) -> list[str]:
    (path / "mine.yaml").write_text(text)
    return ["fit", "-c", str(path / "mine.yaml"), *MODEL, *DATA]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells as calls in this process, whose titles are noted; the one called `killed` is killed by a signal."""
    titles: list[str] = []

    def process(cell: Any, *_: Any) -> int:
        titles.append(cell.title)
        cell.directory.mkdir(parents=True, exist_ok=True)
        (cell.directory / "output.txt").touch()
        return -9 if titles.count(cell.title) <= 2 and cell.title == "2-full-seed1" else main(cell.command)

    monkeypatch.setattr(cells, "_process", process)
    return titles


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_and_a_soup_keep_the_masks_and_say_where_they_began(tmp_path: Path, in_process: list[str]) -> None:
    run = tmp_path / "run"
    once = RECIPE.replace("num_seeds: 2", "num_seeds: 1")
    quick = ["--summary=false", "--drift=false", "--trainer.callbacks=[]"]
    assert main([*recipe(tmp_path, once), "--run_dir", str(run), *quick]) == 0
    assert in_process == ["1-block", "2-full"]
    stages = [str(run / stage) for stage in in_process]
    assert main(["soup", *stages, "--weights=greedy", f"--run_dir={run / 'soup'}", "--summary=false"]) == 0
    block, full, soup = [Report.load(run / stage / "report.json") for stage in (*in_process, "soup")]
    masks = Masks.load(run / "1-block" / "masks.safetensors")
    assert masks.sparsity == 0.5
    for stage in ("1-block", "2-full", "soup"):
        assert Masks.load(run / stage / "masks.safetensors") == masks
        assert masks.violations_in(run / stage / "model") == 0
    assert (full.initial_perplexity, full.label) == (block.perplexity, "full (distillation) after block")
    assert sum(one["share"] for one in soup.parents) == 1
    assert soup.train_tokens == block.train_tokens + full.train_tokens
    assert [one.dense_perplexity for one in Results.load(run).cells] == [block.dense_perplexity] * 2
    assert verify(run).faults == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_goes_on_at_the_stage_that_was_killed(
    tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, run = [*recipe(tmp_path), "--run_dir", str(tmp_path / "run")], tmp_path / "run"
    assert main(command) == 1
    assert "stage 2-full-seed1 has no result: killed by SIGKILL twice" in capsys.readouterr().err
    assert in_process == ["1-block", "2-full-seed0", "2-full-seed1", "2-full-seed1"]
    assert main(command) == 0
    assert in_process[4:] == ["2-full-seed1", "2-full-soup"]
    assert "together" in capsys.readouterr().out

    masks = Masks.load(run / "1-block" / "masks.safetensors")
    assert masks.sparsity == 0.5
    for stage in ("2-full-seed0", "2-full-seed1", "2-full-soup"):
        assert Masks.load(run / stage / "masks.safetensors") == masks
        assert masks.violations_in(run / stage / "model") == 0
    first, *fulls, soup = [Report.load(run / stage / "report.json") for stage in (*in_process[:3], "2-full-soup")]
    assert [one.initial_perplexity for one in fulls] == [first.perplexity] * 2
    assert fulls[0].label == "full (distillation) after block"
    assert soup.label == "soup of 2 full (distillation) after block"
    assert [one["share"] for one in soup.parents] == [0.5, 0.5]
    assert soup.train_tokens == 2 * 8 * 16
    rows = Results.load(run).cells
    assert [one.dense_perplexity for one in rows] == [first.dense_perplexity] * 4
    assert verify(run).faults == []

    before = (run / "2-full-soup" / "report.json").read_bytes()
    assert main(command) == 0
    assert (run / "2-full-soup" / "report.json").read_bytes() == before
    assert len(in_process) == 6
    assert main([*command, "--pattern=1:4"]) == 1
    assert "one of this very recipe" in capsys.readouterr().err
    _other_runs_are_refused(run, tmp_path, capsys)


def _other_runs_are_refused(run: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other masks, another dense model, a damaged run; the same command in a new directory ends at the same bits."""
    again = [
        "fit",
        "-c",
        "scopes/full",
        *MODEL,
        *DATA,
        "--model.loss=distillation",
        "--model.lr=1e-3",
        "--summary=false",
    ]
    again += ["--model.epochs=1", "--baselines=false", "--drift=false", "--trainer.logger=false"]
    assert main([*again, f"--from={run / '1-block'}", f"--run_dir={path / 'again'}"]) == 0
    weights = [load_file(one / "model" / "model.safetensors") for one in (path / "again", run / "2-full-seed0")]
    assert same(*weights)
    masks = Masks.load(run / "1-block" / "masks.safetensors")
    Masks({name: ~masks[name] for name in masks}).save(path / "masks.safetensors")
    capsys.readouterr()
    refused = [
        ([f"--masks={path / 'masks.safetensors'}"], "starts from weights under its own masks"),
        (["--model.shape.hidden_size=16"], "needs a run of the same dense model"),
        (["--criterion=null", "--pattern=null"], "recovers under the masks of that run"),
    ]
    for options, said in refused:
        assert main([*again, f"--from={run / '1-block'}", f"--run_dir={path / 'other'}", *options]) == 2
        assert said in capsys.readouterr().err
    assert main([*again, "--model.start=run", f"--run_dir={path / 'other'}"]) == 2
    assert "name it: --from runs/x" in capsys.readouterr().err
    assert main(["soup", str(run / "1-block"), str(run / "1-block")]) == 1
    assert "needs different models" in capsys.readouterr().err
    identity = Origin(run / "1-block").identity()
    assert identity["masks"] == masks.fingerprint()
    (run / "1-block" / "model" / "model.safetensors").write_bytes(b"damaged")
    assert main([*again, f"--from={run / '1-block'}", f"--run_dir={path / 'other'}"]) == 2
    assert "got a damaged one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.num_blocks=2"], "stage 2-full: FullRetraining has no option --model.num_blocks"),
        (["--model.epochs=0"], "stage 1-block: model.epochs must be at least 1"),
        (["--device_memory=1KiB"], r"needs to fit in 1.0 KiB, got none of 1 that does, the nearest: .*mine.yaml"),
        (["-c", "recipes/block"], "takes one recipe"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(
    more: list[str], said: str, tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recipe(tmp_path), "--run_dir", str(tmp_path / "run"), *more]) in (1, 2)
    assert re.search(said, capsys.readouterr().err)
    assert in_process == []
    assert not (tmp_path / "run").exists()


def needs(name: str, *stages: tuple[int, int, int], scope: Any = "block") -> RecipeNeeds:
    """A recipe of stages with a number of recoveries, a peak and seconds of each."""
    found = [
        (number, Prediction(PlanOptions(scope), [Snapshot("step", Counter(weights=peak))], {}, {}, {}, float(seconds)))
        for number, peak, seconds in stages
    ]
    return RecipeNeeds(name, found)


def test_the_first_recipe_that_fits_is_taken() -> None:
    large, long = needs("large", (1, 10, 60), (3, 40, 60), scope="full"), needs("long", (1, 20, 600))
    small = needs("small", (1, 5, 60))
    assert (large.peak, large.seconds, large.trains_whole, small.trains_whole) == (40, 240.0, True, False)
    assert choose([large, long, small], None, None)[0] is large
    assert choose([large, long, small], 30, None)[0] is long
    taken, why = choose([large, long, small], 30, 5.0)
    assert taken is small
    assert "large 40 B of 30 B; long 10.0 of 5.0 minutes" in why
    with pytest.raises(ValueError, match=r"in 4 B and 0.5 minutes, got none of 3 .*: small 5 B of 4 B and 1.0 of"):
        choose([large, long, small], 4, 0.5)
