"""Tasks of commands: what reports say, that a killed run asks nothing twice, and that training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from recon.basics.digests import sha256_of
from recon.cli import main
from recon.cli.resolver import CommandResolver
from recon.evaluation.tasks.options import TaskOptions
from recon.evaluation.tasks.suite import Suite
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.spec import Comparison, plan
from tests.cli.test_cli import DATA, RANDOM

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra `eval`")

TASKS = ["--tasks=identifiers", "--limit=5"]
FIT = ["fit", "-c", "scopes/matrix", "--drift=false", *DATA, *RANDOM]


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that was killed while it scored the pruned model, and started again; with every task that was asked."""
    path, score, asked = tmp_path_factory.mktemp("tasks") / "run", Suite.score, []

    def once(self: Suite, name: str, model: Any, tokenizer: Any) -> Any:
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score(self, name, model, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Suite, "score", once)
        assert main([*FIT, *TASKS, "--run_dir", str(path)]) != 0
        assert json.loads((path / "tasks.json").read_text())["dense"].keys() == {"identifiers"}
        assert main([*FIT, *TASKS, "--run_dir", str(path)]) == 0
        assert main([*FIT, *TASKS, "--run_dir", str(path)]) == 0  # finished
    return path, asked


@pytest.fixture(scope="module")
def run(killed: tuple[Path, list[str]]) -> Path:
    return killed[0]


@pytest.mark.slow
def test_a_killed_run_asks_nothing_twice(killed):
    assert len(killed[1]) == 4, "dense, pruned twice, recovered"


def test_a_run_scores_the_dense_the_pruned_and_the_recovered_model(run):
    held = report(run)
    assert held["tasks"]["identifiers"]["num_documents"] == 5
    assert held["references"].keys() == {"dense", "pruned"}
    assert all("identifiers" in one["tasks"] for one in held["references"].values())
    dense = held["references"]["dense"]["tasks"]["identifiers"]["metrics"]["acc"]["value"]
    assert held["task_deltas"]["identifiers"] == pytest.approx(held["task_mean"]["value"] - dense)
    assert not (run / "tasks.json").exists()


def test_training_does_not_notice(run, tmp_path):
    assert main([*FIT, "--run_dir", str(tmp_path / "plain")]) == 0
    files = [sha256_of(one / "model" / "model.safetensors") for one in (run, tmp_path / "plain")]
    assert files[0] == files[1]
    assert report(tmp_path / "plain")["tasks"] == {}


def test_test_gives_the_same_scores_with_the_distance_to_the_dense_model(run, tmp_path, capsys):
    assert main(["test", str(run), "--run_dir", str(tmp_path / "test"), *TASKS]) == 0
    assert report(tmp_path / "test")["tasks"] == report(run)["tasks"]
    assert report(tmp_path / "test")["task_deltas"] == report(run)["task_deltas"]
    assert "identifiers 5 documents, 0-shot" in capsys.readouterr().out
    more = ["--tasks=identifiers", "--limit=4", "--baselines=true"]  # which the run has not measured
    assert main(["test", str(run), "--run_dir", str(tmp_path / "more"), *more]) == 0
    measured = report(tmp_path / "more")
    assert measured["references"]["dense"]["tasks"]["identifiers"]["num_documents"] == 4
    assert measured["task_deltas"].keys() == {"identifiers"}
    assert measured["dense_perplexity"] == report(run)["dense_perplexity"]


def test_prune_scores_the_dense_and_the_pruned_model(run, tmp_path):
    assert main(["prune", *DATA, *RANDOM, *TASKS, "--drift=false", "--run_dir", str(tmp_path / "pruned")]) == 0
    held = report(tmp_path / "pruned")
    assert held["tasks"] == report(run)["references"]["pruned"]["tasks"]
    assert held["references"]["dense"]["tasks"] == report(run)["references"]["dense"]["tasks"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--tasks=identifiers", "--model.offload=disk"],
            "needs the whole model on one device, got model.offload: disk",
        ),
        (["--tasks=identifiers", "--limit=6"], "whose run differs in tasks.limit"),
        (["--tasks=./none.yaml"], "which is no file"),
        (["--tasks=identifiers", "--num_fewshot=-1"], "--num_fewshot must be at least 0"),
    ],
)
def test_refusals_come_first(more, said, run, tmp_path, capsys):
    path = run if "limit=6" in str(more) else tmp_path / "new"
    assert main([*FIT, *more, "--run_dir", str(path)]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new" / "masks.safetensors").exists()


def test_test_needs_a_run_for_its_dense_model(capsys):
    assert main(["test", "bundled", "--baselines=true"]) == 2
    assert "--baselines needs a run, whose dense model is known, got bundled" in capsys.readouterr().err


def cells(tasks: TaskOptions, **options: Any) -> dict[str, Any]:
    """Title -> cell of a comparison of one recovery, with the trial of an option."""
    entry = Entry("full", tune={"model.lr": [1e-3]})
    comparison = Comparison("x", [entry], tasks=tasks, **options)
    (group,) = plan(comparison, comparison.models[0], CommandResolver())
    ((_, trial),) = group.trials(entry)
    return {"dense": group.dense, "pruned": group.pruned, "full": group.recovery(entry, {}), "trial": trial}


def test_cells_of_a_comparison_are_known_by_their_tasks():
    plain, asked = cells(TaskOptions()), cells(TaskOptions(["identifiers"], limit=5))
    assert not any("tasks" in part for cell in plain.values() for part in cell.command)
    assert [title for title, cell in asked.items() if '--tasks=["identifiers"]' in cell.command] == [
        *("dense", "pruned", "full")
    ]
    others = cells(TaskOptions(["identifiers"], limit=6))
    smaller = cells(TaskOptions(["identifiers"], limit=5, task_batch_size=1))
    for title in ("dense", "pruned"):
        assert len({one[title].directory for one in (plain, asked, others)}) == 3
        assert smaller[title].directory == asked[title].directory
        assert "--task_batch_size=1" in smaller[title].command
