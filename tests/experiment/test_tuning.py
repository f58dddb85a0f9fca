"""Options chosen on the validation split: the choice itself, a tuned comparison end to end, how it is shown."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from recon.cli import main
from recon.cli.resolver import CommandResolver
from recon.data import TokenData
from recon.evaluation.perplexity import evaluate
from recon.experiment.comparison.compare import compare
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.spec import Comparison, plan
from recon.experiment.comparison.tuning import choose, grid
from recon.models.loading import ModelSource
from recon.report import Report, Results, markdown_table, print_table
from recon.report.tuning import brief

SHAPE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
DATA = ["--data.num_sequences=8", "--data.seq_len=64", "--data.num_validation=4"]


def report(perplexity: float | None = 1.0, split: str = "validation", **changes: Any) -> Report:
    values = {"scope": "full", "model": "m", "criterion": "wanda", "pattern": "2:4", "seed": 0, "seconds": 2.0}
    return Report(**(values | {"perplexity": perplexity, "protocol": {"split": split}} | changes))  # pyright: ignore


# --- the grid and the choice ---------------------------------------------------------------------------


def test_a_grid_is_the_product():
    tune = {"model.lr": [1e-3, 2e-3], "model.epochs": [1, 2, 4]}
    points = grid(tune)
    assert [(p["model.lr"], p["model.epochs"]) for p in points] == list(itertools.product(*tune.values()))
    assert grid({}) == []


def test_the_lowest_is_chosen_the_first_of_several():
    points = [{"model.lr": lr} for lr in (1.0, 2.0, 3.0, 4.0, 5.0)]
    outcomes = [report(9.0), report(7.0), "out of memory", report(7.0), report(float("inf"))]
    choice = choose(points, outcomes)
    assert choice.options == {"model.lr": 2.0}
    assert choice.error is None
    assert [point["chosen"] for point in choice.tried] == [False, True, False, False, False]
    assert [point["perplexity"] for point in choice.tried] == [9.0, 7.0, None, 7.0, None]
    assert [point.get("error") for point in choice.tried] == [
        None, None, "out of memory", None, "its perplexity is not finite"
    ]  # fmt: skip
    assert choose([], []).options == {}


def test_nothing_is_chosen_if_all_fail():
    choice = choose([{"model.lr": 1e-3}, {"model.lr": 2e-3}], ["out of memory", report(None)])
    assert choice.options == {}
    assert choice.error is not None
    assert "all 2 failed; the first, lr=1e-3: out of memory" in choice.error
    assert not any(point["chosen"] for point in choice.tried)


def test_a_choice_on_the_test_split_is_our_bug():
    with pytest.raises(AssertionError, match="must not see the test split"):
        choose([{"model.lr": 1.0}], [report(split="test")])


@pytest.mark.parametrize(
    ("options", "tune", "message"),
    [
        ({}, {"model.lr": []}, "at least one value of model.lr to try, got none for 'mine'"),
        ({"model.lr": 1e-3}, {"model.lr": [1e-3]}, "either given or tuned, got both for model.lr of 'mine'"),
    ],
)
def test_impossible_grids_are_refused(options, tune, message):
    with pytest.raises(ValueError, match=message):
        Entry("full", options=options, label="mine", tune=tune)


# --- where the choice is made and used -----------------------------------------------------------------


def test_tuned_once_per_model_and_used_everywhere(tmp_path, monkeypatch):
    """Cells are made up: on the test split the other learning rate would be best."""
    commands = []

    def made_up(cell, prefix, *_):
        commands.append((cell.title, cell.command))
        assert prefix.startswith(f"[{len(commands)}/")
        if "--model.lr=0.5" in cell.command or "--model.lr=0.25" in cell.command:
            is_trial, is_half = "--evaluate_on=validation" in cell.command, "--model.lr=0.5" in cell.command
            return report(1.0 if is_trial == is_half else 2.0, "validation" if is_trial else "test")
        return report(3.0, "test")

    monkeypatch.setattr("recon.experiment.comparison.pool.outcome", made_up)
    comparison = Comparison(
        "x",
        [Entry("full", tune={"model.lr": [0.25, 0.5]}), Entry("block", options={"model.epochs": 2})],
        criteria=[{"class_path": f"recon.criteria.{name}"} for name in ("Wanda", "Magnitude")],
        models=[{"name": "random", "shape": SHAPE | {"hidden_size": size}} for size in (32, 64)],
        seeds=[3, 4],
        options={"trainer.precision": "bf16-mixed"},
        directory=str(tmp_path),
    )
    results = compare(comparison, CommandResolver())
    assert len(commands) == comparison.num_cells == 2 * (1 + 2 + 4 * 3)
    trials = [command for title, command in commands if title.startswith("tune full lr=")]
    assert len(trials) == 4
    for command in trials:
        assert command[command.index("--seed_everything") + 1] == "3"
        assert any("Wanda" in argument for argument in command)
        assert "--trainer.precision=bf16-mixed" in command
    full = [command for title, command in commands if title == "full"]
    assert len(full) == 8
    assert all("--model.lr=0.5" in command and "--evaluate_on=validation" not in command for command in full)
    for cell in results.cells:
        assert [point["chosen"] for point in cell.tuning] == ([False, True] if cell.scope == "full" else [])
        assert cell.protocol["split"] == "test"


def test_a_grid_that_fails_fails_its_cells(tmp_path, monkeypatch):
    titles = []

    def made_up(cell, prefix, *_):
        titles.append(cell.title)
        return "out of memory" if cell.title.startswith("tune") else report(3.0, "test")

    monkeypatch.setattr("recon.experiment.comparison.pool.outcome", made_up)
    entries = [Entry("full", tune={"model.lr": [1e-3, 2e-3]}), Entry("matrix")]
    comparison = Comparison("x", entries, seeds=[0, 1], directory=str(tmp_path))
    cells = compare(comparison, CommandResolver()).cells
    assert "full" not in titles
    assert [cell.status for cell in cells] == ["ok", "ok", "failed", "ok"] * 2
    for failed in (cells[2], cells[6]):
        assert "all 2 failed; the first, lr=1e-3: out of memory" in (failed.error or "")
        assert [point["error"] for point in failed.tuning] == ["out of memory"] * 2
        assert failed.run_dir == ""
    assert [cell.status for cell in Results.load(tmp_path).cells] == [cell.status for cell in cells]


def test_a_cell_is_found_again_under_another_title(tmp_path):
    def directory(label):
        comparison = Comparison("x", [Entry("block", label=label)], directory=str(tmp_path))
        (group,) = plan(comparison, comparison.models[0], CommandResolver())
        return group.recovery(comparison.recoveries[0], {}).directory

    first = directory("one")
    assert first.name.startswith("one-")
    first.mkdir()
    assert directory("other") == first


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A comparison of one recovery, one point of whose grid must fail."""
    directory = tmp_path_factory.mktemp("tuned")
    recoveries = [{"scope": "full", "options": {"model.epochs": 1}, "tune": {"model.lr": [1e-2, 1e-3, -1.0]}}]
    options = ["-c", "comparisons/smoke", "--directory", str(directory), f"--recoveries={json.dumps(recoveries)}"]
    return (
        directory,
        options,
        subprocess.run([sys.executable, "-m", "recon", "compare", *options], capture_output=True, text=True),
    )


@pytest.mark.slow
def test_the_choice_is_made_on_validation_and_measured_on_test(tuned):
    directory, _, finished = tuned
    assert finished.returncode == 0, finished.stderr
    assert "[3/6 tune full lr=1e-2] load random" in finished.stdout
    full = Results.load(directory).cells[2]
    trials = {lr: Report.load(next(directory.glob(f"tune-full-lr-1e-{lr}-*/report.json"))) for lr in (3, 2)}
    assert [point["perplexity"] for point in full.tuning] == [trials[2].perplexity, trials[3].perplexity, None]
    best = min(trials, key=lambda lr: trials[lr].perplexity or 0.0)
    assert [point["chosen"] for point in full.tuning] == [best == 2, best == 3, False]
    assert f"full: lr=1e-{best} chosen of 3 on the validation split" in finished.stdout
    assert "learning rate: -1.0" in full.tuning[2]["error"]
    for trial in trials.values():
        assert (trial.protocol["split"], trial.protocol["num_sequences"]) == ("validation", 4)
        assert trial.drift == {}
        assert not Path(trial.run_dir, "model").exists()
    assert full.status == "ok"
    assert (full.protocol["split"], full.protocol["num_sequences"]) == ("test", 8)
    config = yaml.safe_load(Path(full.run_dir, "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 10.0**-best
    assert config["evaluate_on"] == "test"


@pytest.mark.slow
def test_a_second_run_keeps_the_grid(tuned, capsys):
    directory, options, _ = tuned
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*/report.json")}
    assert len(before) == 5
    assert main(["compare", *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*/report.json")} == before
    printed = capsys.readouterr().out
    assert "tune full lr=1e-2]" not in printed
    assert "chosen of 3 on the validation split" in printed


# --- recon fit --evaluate_on ---------------------------------------------------------------------------


def test_evaluate_on_validation_leaves_the_test_split_alone(tmp_path, capsys):
    """More test sequences than there are: asking for them is an error."""
    shape = [f"--model.shape={json.dumps(SHAPE)}", "--model.name=random"]
    fit = ["fit", "-c", "scopes/matrix", *shape, *DATA, "--data.num_test=1000000000", "--run_dir", str(tmp_path)]
    assert main([*fit, "--evaluate_on=validation"]) == 0
    assert "validation perplexity  dense" in capsys.readouterr().out
    report = Report.load(tmp_path / "report.json")
    assert report.protocol["split"] == "validation"
    model, data = ModelSource(str(tmp_path / "model")).load(torch.device("cpu"))[0], TokenData(None, 8, 64, 4)
    data.tokenizer = ModelSource("random", shape=SHAPE).load(torch.device("cpu"))[1]
    assert report.perplexity == evaluate(model, data.val_dataloader(), "validation").perplexity
    assert None not in (report.dense_perplexity, report.pruned_perplexity)
    assert main([*fit, "--evaluate_on=validation"]) == 0  # finished
    assert main(fit) == 1
    assert "--evaluate_on test needs a run that was evaluated there" in capsys.readouterr().err


# --- how it is shown -----------------------------------------------------------------------------------


def cell(values: dict[str, list], best: int, failed: int | None = None, **changes: Any) -> Report:
    points = grid(values)
    outcomes: list[Report | str] = [report(10.0 + abs(i - best)) for i in range(len(points))]
    if failed is not None:
        outcomes[failed] = "diverged " * 50
    return report(9.0, "test", tuning=choose(points, outcomes).tried, **changes)


def lines(results: Results) -> str:
    file = io.StringIO()
    print_table(results, Console(file=file, width=100))
    return file.getvalue()


def test_the_table_lists_what_was_tried():
    values = {"model.lr": [3e-3, 6e-3, 1.2e-2], "model.epochs": [2]}
    cells = [
        cell(values, best=1, failed=2, pattern=pattern, seed=seed) for pattern in ("2:4", "4:8") for seed in (5, 6)
    ]
    text = markdown_table(Results(cells))
    assert text.count("**tuning (validation perplexity)**") == 1
    section = text[text.index("**tuning") : text.index("4:8**")]
    assert "| full | lr=3e-3 epochs=2 | 11.00 | 2.0 |  |" in section
    assert "|  | lr=6e-3 epochs=2 | 10.00 | 2.0 | chosen |" in section
    assert "|  | lr=1.2e-2 epochs=2 | - | - |  |" in section
    assert "- full with lr=1.2e-2 epochs=2 is no candidate: diverged" in section
    assert "tuned on wanda, 2:4, seed 5; each choice serves all texts, criteria, patterns and seeds" in section
    assert max(map(len, section.splitlines())) < 240
    assert "tuning" in lines(Results(cells))
    assert "tuning" not in lines(Results([report()]))


@pytest.mark.parametrize(("best", "note"), [(0, "6e-3, is the smallest"), (1, None), (2, "2.4e-2, is the largest")])
def test_a_choice_at_the_end_of_its_grid_is_noted(best, note):
    one = cell({"model.lr": [6e-3, 1.2e-2, 2.4e-2]}, best)
    assert ("the best lr" in lines(Results([one]))) == (note is not None)
    assert note is None or f"full: the best lr, {note} tried" in lines(Results([one]))


def test_names_have_no_ends():
    assert "the best" not in lines(Results([cell({"model.start": ["exact", "pruned"]}, 0)]))
    assert "the best" not in lines(Results([cell({"model.lr": [1e-3], "model.train": ["all", "blocks"]}, 0)]))


def test_a_report_with_tuning_comes_back_equal(tmp_path):
    original = cell({"model.lr": [1e-3, 2e-3], "model.start": ["exact", "pruned"]}, 1, failed=3)
    original.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == original
    assert json.loads((tmp_path / "report.json").read_text())["tuning"][3]["perplexity"] is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(6e-3, "6e-3"), (1.2e-2, "1.2e-2"), (0.5, "0.5"), (0.0, "0.0"), (4, "4"), (True, "true"), ("exact", "exact"),
     (1e6, "1e6"), (-1e-5, "-1e-5"), ([0.9, 0.95], "[0.9, 0.95]")],
)  # fmt: skip
def test_values_are_brief(value, shown):
    assert brief({"model.x": value, "data.batch_size": 2}) == f"x={shown} data.batch_size=2"
