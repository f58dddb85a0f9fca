"""Command lines as newcomers write them: order, short forms, and mistakes answered before anything is imported."""

import json
import subprocess
import sys
import time

import pytest

from recon.basics.refusals import UsageError
from recon.cli import main
from recon.cli.arrange import arrange
from recon.cli.configs import find_config
from recon.cli.fit import parse_only

BLOCK = find_config("scopes/block")


def arranged(text: str, command: str = "fit") -> list[str]:
    return arrange(command, text.split())


# --- order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "--model.lr 1e-5 -c scopes/block",
        "--model.lr=1e-5 -c=scopes/block",
        "--model.lr 1e-5 --config scopes/block",
        "-c scopes/block --model.lr 1e-5",
        "-c models/opt-125m --model.lr 1e-5 --config=scopes/block",
    ],
)
def test_options_beat_configurations_wherever_they_stand(text):
    config = parse_only(text.split())
    assert config.model.class_path == "recon.scopes.BlockDistillation"
    assert config.model.init_args.lr == 1e-5
    assert config.model.init_args.epochs == 2  # of the configuration


def test_a_model_may_stand_before_its_scope():
    assert parse_only(["--model.name", "X", "-c", "scopes/matrix"]).model.init_args.name == "X"


def test_scopes_go_first_and_others_in_the_order_given(tmp_path):
    for name, rate in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.yaml").write_text(f"model:\n  lr: {rate}\n")
    first, second = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert arrange("fit", ["-c", first, "-c", "scopes/block", "-c", second]) == ["-c", BLOCK, "-c", first, "-c", second]
    assert parse_only(["-c", first, "-c", "scopes/block", "-c", second]).model.init_args.lr == 2.0
    assert parse_only(["-c", second, "-c", first, "-c", "scopes/block"]).model.init_args.lr == 1.0


def test_a_scope_may_be_named_after_a_file_with_its_options(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {lr: 3.0}\n")
    config = parse_only(["-c", str(tmp_path / "a.yaml"), "--model", "block"])
    assert (config.model.class_path, config.model.init_args.lr) == ("recon.scopes.BlockDistillation", 3.0)


def test_wholes_go_before_their_parts():
    options = "--pattern.per matrix --pattern 70% --criterion.damping .1 --criterion sparsegpt"
    config = parse_only(["-c", "scopes/block", *options.split()])
    assert (config.pattern.init_args.sparsity, config.pattern.init_args.per) == (0.7, "matrix")
    assert (config.criterion.class_path, config.criterion.init_args.damping) == ("recon.criteria.SparseGPT", 0.1)


def test_another_scope_takes_the_place_of_a_configuration():
    config = parse_only(["-c", "scopes/block", "--model", "full"])
    assert config.model.class_path == "recon.scopes.FullRetraining"


# --- short forms -------------------------------------------------------------------------------------


def test_short_names_reach_the_parser(tmp_path):
    (tmp_path / "my.yaml").write_text("criterion: sparsegpt\npattern: 2:4\ndata: {source: textfiles, seq_len: 32}\n")
    options = "--pruning.allocation owl --pruning.allocation.M 3 --data.source.paths my.txt"
    config = parse_only(
        ["-c", "scopes/matrix", "-c", str(tmp_path / "my.yaml"), *options.split(), "--model.solver=admm"]
    )
    assert config.criterion.class_path == "recon.criteria.SparseGPT"
    assert config.pattern.init_args.as_dict() == {"keep": 2, "of": 4}
    assert config.pruning.allocation.class_path == "recon.allocation.OWL"
    assert config.pruning.allocation.init_args.M == 3
    assert config.model.init_args.solver.class_path == "recon.solvers.ADMMSolver"
    assert config.data.init_args.seq_len == 32
    assert config.data.init_args.source.init_args.paths == ["my.txt"]


@pytest.mark.parametrize(
    ("text", "paths"),
    [("a.txt", ["a.txt"]), ("a.txt b.txt", ["a.txt", "b.txt"]), ("[a,b]", ["a", "b"]), ("1", ["1"])],
)
def test_one_path_is_a_list_of_one(text, paths):
    config = parse_only(f"-c scopes/block --data.source TextFiles --data.source.paths {text}".split())
    assert config.data.init_args.source.init_args.paths == paths


def test_one_path_in_a_file_is_a_list_of_one(tmp_path):
    (tmp_path / "my.yaml").write_text("data:\n  source:\n    class_path: TextFiles\n    init_args: {paths: a.txt}\n")
    config = parse_only(["-c", "scopes/block", "-c", str(tmp_path / "my.yaml")])
    assert config.data.init_args.source.init_args.paths == ["a.txt"]


def test_lists_of_other_options():
    wanda = json.dumps([{"class_path": "recon.criteria.Wanda"}])
    arguments = arranged("-c comparisons/demo --seeds 0 1 --criteria wanda", "compare")
    assert arguments[2:] == ["--seeds=[0, 1]", "--criteria", wanda]
    assert parse_only(["-c", "scopes/block", "--pruning.exclude", "*.down_proj"]).pruning.exclude == ["*.down_proj"]


@pytest.mark.parametrize(
    ("text", "baselines", "drift"),
    [
        ("--baselines", True, True),
        ("--baselines false --drift", False, True),
        ("--no_drift --baselines=true", True, False),
    ],
)
def test_switches(text, baselines, drift):
    config = parse_only(f"-c scopes/block {text}".split())
    assert (config.baselines, config.drift) == (baselines, drift)


def test_a_switch_leaves_the_path_behind_it():
    assert arranged("--markdown runs/x runs/y --memory", "report") == [
        "--markdown=true",
        "runs/x",
        "runs/y",
        "--memory=true",
    ]
    assert arranged("runs/x --markdown false", "report") == ["runs/x", "--markdown", "false"]


# --- mistakes ----------------------------------------------------------------------------------------

MISTAKES = {
    "root": ("fit --modle.lr 1 -c scopes/block", "recon fit has no option --modle.lr; did you mean --model.lr"),
    "part alone": ("fit --lr 1 -c scopes/block", "has no option --lr; did you mean --model.lr?"),
    "part": (
        "fit --model.lrr 1 -c scopes/block",
        "BlockDistillation has no option --model.lrr; did you mean --model.lr",
    ),
    "of another": (
        "fit --model.num_blocks 2 -c scopes/submodule",
        "SubmoduleDistillation has no option --model.num_blocks; BlockDistillation has it",
    ),
    "nested": ("fit -c scopes/block --model.lora.rnk 3", "did you mean --model.lora.rank"),
    "trainer": ("fit -c scopes/block --trainer.precison 3", "did you mean --trainer.precision"),
    "data": ("fit -c scopes/block --data.sequence_len 3", "did you mean --data.seq_len"),
    "dashes": ("fit -c scopes/block --run-dir x", "did you mean --run_dir?"),
    "source not chosen": (
        "fit -c scopes/block --data.source.paths x",
        "paths belongs to Chat and TextFiles",
    ),
    "criterion's": (
        "prune --criterion.damping 1",
        "ADMM and ALPS and SparseGPT have it",
    ),
    "criterion": ("prune --criterion sparsegtp", "did you mean SparseGPT"),
    "value": ("fit -c scopes/matrix --model.propagation recoverd", "got recoverd; did you mean recovered?"),
    "config": ("fit -c scopes/blok", "got 'scopes/blok'; did you mean scopes/block?"),
    "config of a comparison": ("compare -c comparisons/dem", "did you mean comparisons/demo"),
    "no config": ("fit -c", "-c needs a YAML file or the name of a shipped configuration, got nothing"),
    "no scope": ("fit", "needs a scope to recover at, got none; choose one: -c scopes/block, scopes/full"),
    "no scope but a model": ("fit --model.name x", "needs a scope"),
    "no value": ("fit -c scopes/block --masks", "--masks needs a value, got none"),
    "stray": ("fit -c scopes/block runs/x", "takes options only, got 'runs/x'"),
    "command": ("prunne", "there is no command 'prunne'; did you mean prune?"),
    "scope of prune": ("prune -c scopes/block", "recon prune has no option --model.epochs (in "),
    "compare": ("compare -c comparisons/demo --seed 1", "did you mean --seeds?"),
    "test": ("test runs/x --sumary false", "did you mean --summary?"),
    "plan": ("plan -c models/opt-125m --device_memry 1GiB", "did you mean --device_memory?"),
    "report": ("report runs/x --markdwn", "did you mean --markdown?"),
    "merge": ("merge runs/x --run_dirr y", "has no option --run_dirr"),
    "consolidate": ("consolidate runs/x --too y", "did you mean --to?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_status_2(mistake, capsys):
    text, message = MISTAKES[mistake]
    assert main(text.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    (tmp_path / "my.yaml").write_text("data: {seqlen: 3}\n")
    with pytest.raises(UsageError, match=r"no option --data\.seqlen \(in .*my\.yaml\); did you mean --data\.seq_len"):
        arrange("fit", ["-c", "scopes/block", "-c", str(tmp_path / "my.yaml")])


def test_classes_of_the_user_are_not_judged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("import elsewhere\nclass Mine(elsewhere.Base):\n    pass\n")
    assert arranged("-c scopes/block --criterion mine.Mine --criterion.anything 1")[-2:] == [
        "--criterion.anything",
        "1",
    ]
    assert arranged("-c scopes/block --trainer.callbacks+ mine.C --trainer.callbacks.x 1")[-1] == "1"


HEAVY = "{'torch', 'lightning', 'transformers', 'datasets', 'matplotlib', 'deepspeed', 'jsonargparse'}"


@pytest.mark.parametrize(
    "text", ["fit --modle.lr 1 -c scopes/block", "fit --help", "fit --help.trainer", "prune --criterion x"]
)
def test_a_mistake_and_help_are_answered_at_once(text):
    script = f"import sys; from recon.cli import main; main({text.split()!r}); print({HEAVY} & set(sys.modules))"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("set()\n")
    assert time.monotonic() - began < 10  # 0.3 s on an idle machine; with the imports 5 s on one, and more than 10 here
