"""A comparison end to end: cells in processes of their own, kept by fingerprint, failures shown."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from recon.cli import main
from recon.cli.compare import parsed
from recon.cli.resolver import CommandResolver
from recon.experiment.comparison.entry import Entry
from recon.experiment.comparison.spec import Comparison, Text, plan
from recon.pruning.masks import Masks

TASKS = ["--tasks=identifiers", "--limit=8"] if find_spec("lm_eval") else []
SMOKE = [sys.executable, "-m", "recon", "compare", "-c", "comparisons/smoke"]
NAMES = {
    "scope",
    "criterion",
    "pattern",
    "seed",
    "perplexity",
    "dense_perplexity",
    "pruned_perplexity",
    "recovered",
    "sparsity",
    "mask_violations",
    "peak_host_bytes",
    "peak_device_bytes",
    "seconds",
    "train_tokens",
    "status",
    "run_dir",
}


def run(*args):
    return subprocess.run([*SMOKE, *TASKS, *args], capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke comparison, with one recovery added that must fail."""
    directory = tmp_path_factory.mktemp("smoke")
    recoveries = [
        {"scope": "matrix"},
        {"scope": "submodule", "options": {"model.epochs": 1}},
        {"scope": "block", "label": "block broken", "options": {"model.num_blocks": 3}},
        {"scope": "full", "options": {"model.epochs": 1}},
    ]
    options = ["--directory", str(directory), f"--recoveries={json.dumps(recoveries)}"]
    return directory, options, run(*options, "--warm=true")  # test_workers has cells that are no forks


def test_results(smoke):
    directory, _, finished = smoke
    assert finished.returncode == 1, finished.stderr
    cells = json.loads((directory / "results.json").read_text())["cells"]
    assert [cell["scope"] for cell in cells] == ["dense", "pruned", "matrix", "submodule", "block", "full"]
    for cell in cells:
        assert cell.keys() >= NAMES
        assert (cell["criterion"], cell["pattern"], cell["seed"]) == ("wanda", "2:4", 0)
        if cell["status"] == "ok":
            assert cell["mask_violations"] == 0
            assert cell["sparsity"] == (0 if cell["scope"] == "dense" else 0.5)
            assert cell["dense_perplexity"] == cells[0]["perplexity"]
            assert cell["pruned_perplexity"] == cells[1]["perplexity"]
            assert Path(cell["run_dir"], "report.json").exists()
            assert isinstance(cell["peak_host_bytes"], int)


@pytest.mark.skipif(not TASKS, reason="needs lm-evaluation-harness: the extra `eval`")
def test_every_row_is_scored_on_tasks_beside_the_dense_one(smoke):
    cells = json.loads((smoke[0] / "results.json").read_text())["cells"]
    dense = cells[0]["task_mean"]["value"]
    for cell in cells:
        if cell["status"] == "ok":
            assert cell["tasks"]["identifiers"]["num_documents"] == 8
            assert cell["task_deltas"]["identifiers"] == pytest.approx(cell["task_mean"]["value"] - dense)
    table = smoke[2].stdout.partition("\ntasks\n")[2]
    assert [line.split()[0] for line in table.splitlines() if "±" in line][:5] == [
        *("dense", "pruned", "matrix", "submodule", "full")
    ]


def test_a_failed_cell_is_shown_and_stops_nothing(smoke):
    directory, _, finished = smoke
    failed = json.loads((directory / "results.json").read_text())["cells"][4]
    assert failed["status"] == "failed"
    assert "model.num_blocks must be at most 2, the blocks of the model, got 3" in failed["error"]
    assert "1 of 6 cells failed" in finished.stdout


def test_progress_names_cell_and_window(smoke):
    assert "[3/6 matrix] window 2/2  001" in smoke[2].stdout
    assert "[4/6 submodule] window 4/4  001.mlp" in smoke[2].stdout


def test_masks_are_shared(smoke):
    directory = smoke[0]
    masks = {Masks.load(path).fingerprint() for path in directory.glob("*/masks.safetensors")}
    assert len(list(directory.glob("*/masks.safetensors"))) == 4  # pruned, matrix, submodule, full
    assert len(masks) == 1


@pytest.mark.slow
def test_second_run_keeps_finished_cells_and_draws_again(smoke):
    directory, options, _ = smoke
    reports = {path: path.stat().st_mtime_ns for path in directory.glob("*/report.json")}
    again = run(*options)
    assert again.returncode == 1
    assert "[3/6 matrix]" not in again.stdout
    assert reports == {path: path.stat().st_mtime_ns for path in directory.glob("*/report.json")}
    for name in ("pareto.png", "pareto.svg"):
        assert (directory / name).stat().st_size > 1000


@pytest.mark.slow
def test_two_comparisons_in_one_directory_share_its_cells(smoke, tmp_path):
    """One of them with two workers."""
    recoveries = [{"scope": "matrix"}, {"scope": "submodule", "options": {"model.epochs": 1}}]
    command = [*SMOKE, *TASKS, "--directory", str(tmp_path), f"--recoveries={json.dumps(recoveries)}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, *more], **pipes) for more in ([], ["--workers=2", "--threads=1"])]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    took = [set(re.findall(r"^\[\d/4 (\w+)\]", text, re.MULTILINE)) for text in said]
    assert took[0] | took[1] == {"dense", "pruned", "matrix", "submodule"}
    assert not took[0] & took[1], "a cell was run twice"
    ours, single = (json.loads((path / "results.json").read_text())["cells"] for path in (tmp_path, smoke[0]))
    assert [(cell["scope"], cell["perplexity"]) for cell in ours] == [
        (cell["scope"], cell["perplexity"]) for cell in single[:4]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("warm", ["false", "true"])
def test_a_killed_comparison_loses_the_cells_under_way_alone(tmp_path, warm):
    """One of two in a directory: its processes end with it, and the other takes their cells."""
    recoveries = [{"scope": scope} for scope in ("matrix", "submodule", "full")]
    options = ["--directory", str(tmp_path), f"--recoveries={json.dumps(recoveries)}", "--threads=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first, second = (subprocess.Popen([*SMOKE, *options, f"--warm={warm}"], **pipes) for _ in range(2))
    took = any(re.search(r"(matrix|submodule|full)\] load random", line) for line in first.stdout)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/report.json")}
    first.kill()
    first.communicate()
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert took, "the first had no recovery under way"
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(cell["scope"], cell["status"]) for cell in cells] == [
        (scope, "ok") for scope in ("dense", "pruned", "matrix", "submodule", "full")
    ]


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one(tmp_path):
    """With the choice of an option, which needs trials; all but the places and the costs."""
    recoveries = [
        {"scope": "matrix"},
        {"scope": "full", "options": {"model.epochs": 1}, "tune": {"model.lr": [1e-2, 1e-3]}},
    ]
    rows = []
    for workers, *warm in (("1",), ("2",), ("2", "--warm=true")):
        directory = tmp_path / "-".join([workers, *warm])
        finished = run("--directory", str(directory), f"--recoveries={json.dumps(recoveries)}", "--seeds=[0,1]",
                       "--workers", workers, "--threads=1", *warm)  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        rows.append([
            {name: cell[name] for name in NAMES - {"run_dir", "seconds", "peak_host_bytes"}}
            | {"chosen": [point["options"] for point in cell["tuning"] if point["chosen"]]}
            for cell in json.loads((directory / "results.json").read_text())["cells"]
        ])  # fmt: skip
    assert rows[0] == rows[1] == rows[2]
    assert [row["scope"] for row in rows[0]] == ["dense", "pruned", "matrix", "full"] * 2


def planned(comparison):
    """Groups of the only model, each with the cells of its recoveries."""
    groups = plan(comparison, comparison.models[0], CommandResolver())
    return [(group, [group.recovery(entry, {}) for entry in comparison.recoveries]) for group in groups]


def test_plan_shares_dense_and_masks_across_recoveries():
    comparison = Comparison(
        "x", [Entry("matrix"), Entry("full", ["scopes/full"], {"model.lr": 1e-4}, "low lr")], seeds=[0, 1]
    )
    (first, cells), (second, more) = planned(comparison)
    assert first.dense == second.dense
    assert first.pruned.directory != second.pruned.directory
    assert len({cell.directory for cell in cells + more}) == 4
    masks = str(first.pruned.directory / "masks.safetensors")
    assert all(masks in cell.command for cell in cells)
    assert [cells for _, cells in planned(comparison)] == [cells, more]
    assert first.pattern == "60% per row"


def test_allocations_have_masks_and_tables_of_their_own():
    owl = {"class_path": "recon.allocation.OWL"}
    (uniform, _), (other, cells) = planned(Comparison("x", [Entry("matrix")], allocations=[None, owl]))
    assert (uniform.pattern, other.pattern) == ("60% per row", "60% per row, owl")
    assert uniform.pruned.directory != other.pruned.directory
    assert uniform.dense == other.dense
    option = '--pruning.allocation={"class_path": "recon.allocation.OWL"}'
    assert option in other.pruned.command
    assert option in cells[0].command
    assert not any("allocation" in part for part in uniform.pruned.command)


def test_refined_masks_have_a_criterion_of_their_own():
    fixed = {"class_path": "recon.refinement.Swaps", "init_args": {"objective": "fixed"}}
    (plain, _), (refined, cells) = planned(Comparison("x", [Entry("matrix")], refinements=[None, fixed]))
    assert (plain.criterion, refined.criterion) == ("wanda", "wanda + fixed swaps")
    assert plain.pruned.directory != refined.pruned.directory
    option = f"--refinement={json.dumps(fixed)}"
    assert option in refined.pruned.command
    assert option in cells[0].command
    assert not any("refinement" in part for part in plain.pruned.command)


def test_texts_have_masks_of_their_own_and_one_test_split():
    written = {"class_path": "recon.data.SelfGenerated", "init_args": {"temperature": 0.5}}
    texts = [
        Text("people x 8", {"data.num_sequences": 8}),
        Text("model x 8", {"data.num_sequences": 8, "data.source": written}),
    ]
    comparison = Comparison("x", [Entry("matrix")], texts=texts, data={"held_out": "StandardLibrary"})
    (people, _), (model, cells) = planned(comparison)
    assert (people.text, model.text) == ("people x 8", "model x 8")
    assert people.dense == model.dense
    assert people.pruned.directory != model.pruned.directory
    for command in (model.pruned.command, cells[0].command):
        assert f"--data.source={json.dumps(written)}" in command
        assert "--data.num_sequences=8" in command
    assert comparison.num_cells == 5
    texts[0].options["data.num_test"] = 4  # another test split has a dense row of its own
    (other, _), _ = planned(comparison)
    assert other.dense != model.dense
    assert comparison.num_cells == 6
    with pytest.raises(ValueError, match=r"texts: 'x' needs options of the data, such as data.source, got model.lr"):
        Text("x", {"model.lr": 1e-3})


def test_the_text_of_a_class_reaches_the_cells_as_it_was_written(tmp_path):
    source = {"class_path": "recon.data.Mixture", "init_args": {"sources": ["StandardLibrary", "SelfGenerated"]}}
    own = tmp_path / "own.yaml"
    texts = [{"label": "both", "options": {"data.source": source}}]
    own.write_text(json.dumps({"name": "own", "recoveries": [{"scope": "matrix"}], "texts": texts}))
    _, comparison = parsed(["-c", str(own), "--data.held_out=StandardLibrary"])
    ((group, _),) = planned(comparison)
    (given,) = (part for part in group.pruned.command if part.startswith("--data.source="))
    assert json.loads(given.removeprefix("--data.source="))["class_path"] == "recon.data.Mixture"
    assert comparison.data == {"held_out": "recon.data.StandardLibrary"}


def test_a_recovery_that_chooses_its_own_masks_is_given_none():
    options = {"model.propagation": "recovered", "pruning.inputs": "recovered"}
    ((_, (shared, own)),) = planned(Comparison("x", [Entry("block"), Entry("block", options=options)]))
    assert "--masks" in shared.command
    assert "--masks" not in own.command
    assert "--pruning.inputs=recovered" in own.command


def test_an_option_changes_the_directory():
    one, other = (Comparison("x", [Entry("full", options={"model.lr": lr})]) for lr in (1e-4, 2e-4))
    ((first, (cell,)),), ((second, (changed,)),) = planned(one), planned(other)
    assert first.pruned == second.pruned
    assert cell.directory != changed.directory


def test_a_comparison_without_recoveries_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Comparison("x", [])


def directories(comparison):
    """Of the pruned cell and of the only recovery."""
    ((group, (cell,)),) = planned(comparison)
    return group.pruned.directory, cell.directory


def test_an_edited_configuration_is_another_cell(tmp_path):
    own = tmp_path / "own.yaml"
    comparison = Comparison("x", [Entry("full", config=["scopes/full", str(own)])])
    own.write_text("model: {init_args: {lr: 1.0e-3}}")
    pruned, before = directories(comparison)
    assert directories(comparison) == (pruned, before)
    own.write_text("model: {init_args: {lr: 5.0e-2}}")
    assert directories(comparison)[0] == pruned
    after = directories(comparison)[1]
    assert after != before
    own.write_text("# words alone\nmodel: {init_args: {lr: 0.05}}")
    assert directories(comparison)[1] == after


def test_edited_text_is_another_cell(tmp_path):
    text = tmp_path / "text.txt"
    source = {"class_path": "recon.data.TextFiles", "init_args": {"paths": [str(text)]}}
    comparison = Comparison("x", [Entry("full")], data={"source": source})
    text.write_text("one text")
    before = directories(comparison)
    assert directories(comparison) == before
    text.write_text("another text")
    after = directories(comparison)
    assert not set(before) & set(after)


def test_edited_text_of_a_configuration_is_another_cell(tmp_path):
    text, own = tmp_path / "text.txt", tmp_path / "own.yaml"
    own.write_text(
        f"data: {{init_args: {{source: {{class_path: recon.data.TextFiles, init_args: {{paths: [{text}]}}}}}}}}"
    )
    comparison = Comparison("x", [Entry("full", config=["scopes/full", str(own)])])
    text.write_text("one text")
    pruned, before = directories(comparison)
    text.write_text("another text")
    assert directories(comparison)[0] == pruned
    assert directories(comparison)[1] != before


def test_a_cell_that_is_no_command_stops_a_comparison_before_it_runs(tmp_path, capsys):
    recoveries = json.dumps([{"scope": "matrix"}, {"scope": "full", "options": {"model.lrr": 1}}])
    options = ["--directory", str(tmp_path / "runs"), f"--recoveries={recoveries}"]
    assert main(["compare", "-c", "comparisons/smoke", *options]) != 0
    assert "recoveries: 'full' cannot run: FullRetraining has no option --model.lrr" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
