"""Commands as a user gives them: what they write, what they refuse, and that a killed run goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from recon.basics.manifest import Entry
from recon.basics.run_paths import RunPaths
from recon.cli import main
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from recon.report import Report
from tests.support.shapes import TIED_LLAMA, random_model
from tests.support.slow import quick

DATA = ["--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"]
RANDOM = random_model(TIED_LLAMA)
SCOPES = ["matrix", "submodule", "block", "full"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model directory of another family, with Conv1D weights and the bundled tokenizer."""
    path = tmp_path_factory.mktemp("gpt2") / "model"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(path)
    ModelSource().load_tokenizer().save_pretrained(path)
    return str(path)


def fit(scope, run_dir, *args):
    epochs = [] if scope == "matrix" else ["--model.epochs=1"]
    return main(["fit", "-c", f"scopes/{scope}", "--run_dir", str(run_dir), *DATA, *epochs, *args])


def assert_complete(run_dir, scope):
    report = json.loads((run_dir / "report.json").read_text())
    assert report["status"] == "ok"
    assert report["scope"] == scope
    assert report["mask_violations"] == 0
    assert report["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert isinstance(report["peak_host_bytes"], int)
    assert report["train_tokens"] == 8 * 32
    assert report["dense_perplexity"] > 1
    assert report["pruned_perplexity"] > 1
    for name in ("config.yaml", "fingerprint.json", "memory.json", "masks.safetensors", "logs"):
        assert (run_dir / name).exists()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    masks = Masks.load(run_dir / "masks.safetensors")
    masks.check(model)
    assert len(AutoTokenizer.from_pretrained(run_dir / "model")("def f(x):")["input_ids"]) > 1


@pytest.mark.parametrize("scope", quick(SCOPES, "full"))
def test_fit_random_llama(scope, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert fit(scope, run_dir, *RANDOM) == 0
    assert_complete(run_dir, scope)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert fit(scope, run_dir, *RANDOM) == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    assert before.keys() == {path for path in run_dir.rglob("*") if path.is_file()}
    assert (run_dir / "report.json").stat().st_mtime_ns == before[run_dir / "report.json"]


@pytest.mark.parametrize("scope", quick(SCOPES, "matrix"))
def test_fit_gpt2_by_path(scope, gpt2, tmp_path):
    assert fit(scope, tmp_path / "run", "--model.name", gpt2) == 0
    assert_complete(tmp_path / "run", scope)


def test_fit_bundled_with_options(tmp_path):
    options = ["--model.num_blocks=4", "--pattern=NM", "--pattern.keep=1", "--pattern.of=4", "--criterion=Magnitude"]
    assert fit("block", tmp_path / "run", *options) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["label"], report["pattern"], report["criterion"]) == ("block x4", "1:4", "magnitude")
    assert report["sparsity"] == 0.75
    windows = sorted(path.name for path in (tmp_path / "run" / "windows").iterdir())
    assert windows == ["000-003.safetensors", "004-005.safetensors"]


def test_prune_then_fit_with_its_masks_then_test(tmp_path, capsys):
    pruned, run = tmp_path / "pruned", tmp_path / "run"
    assert main(["prune", "--run_dir", str(pruned), "--save_model=true", *RANDOM, *DATA]) == 0
    masks = Masks.load(pruned / "masks.safetensors")
    masks.check(AutoModelForCausalLM.from_pretrained(pruned / "model"))
    assert fit("matrix", run, *RANDOM, "--masks", str(pruned / "masks.safetensors"), "--criterion=Magnitude") == 0
    assert Masks.load(run / "masks.safetensors") == masks
    report = json.loads((run / "report.json").read_text())
    capsys.readouterr()
    assert main(["test", str(run), "--run_dir", str(tmp_path / "tested")]) == 0
    tested = json.loads((tmp_path / "tested" / "report.json").read_text())
    assert tested["perplexity"] == report["perplexity"]
    assert tested["protocol"] == report["protocol"]
    assert tested["mask_violations"] == 0
    assert tested["sparsity"] == pytest.approx(report["sparsity"])
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    with torch.no_grad():
        model.get_parameter(next(iter(masks)))[~masks[next(iter(masks))]] = 1.0
    model.save_pretrained(run / "model")
    assert main(["test", str(run), "--run_dir", str(tmp_path / "broken")]) == 1
    assert f"{run / 'model/model.safetensors'} has not the sha256 that was written" in capsys.readouterr().err
    RunPaths(run).manifest.record({path: Entry.of(path) for path in (run / "model").iterdir()})
    assert main(["test", str(run), "--run_dir", str(tmp_path / "broken")]) == 0
    broken = json.loads((tmp_path / "broken" / "report.json").read_text())
    assert broken["mask_violations"] == int((~masks[next(iter(masks))]).sum())


USAGE = {"sparsity", "epochs", "unknown option", "unknown scope", "pattern", "exclusion"}
"""Mistakes of the command line itself."""

CONSTRAINTS = Path(__file__).parents[2] / "launch/constraints.txt"
"""A short text: the standard library takes 15 seconds to tokenise."""

WRONG = {
    "sparsity": (["--pattern.sparsity=1.5"], r"needs 0 <= sparsity < 1, got 1.5"),
    "model path": (
        ["--model.shape=null", "--model.name=/nowhere/model"],
        r"model.name needs .*, got '/nowhere/model', which does not exist",
    ),
    "too few tokens": (
        ["--data.num_sequences=99999", "--data.source=TextFiles", f"--data.source.paths=[{CONSTRAINTS}]"],
        r"need \d+ tokens, .* holds \d+",
    ),
    "pattern": (["--pattern=NM", "--pattern.of=5"], r"2:5 needs in_features divisible by 5, got 32 for `model"),
    "masks file": (["--masks=nowhere.safetensors"], r"--masks needs a file that `recon prune` wrote, got nowhere"),
    "exclusion": (['--pruning.exclude=["*.nope"]'], r"'\*.nope' matches none"),
    "epochs": (["--model.epochs=0"], r"model.epochs must be at least 1, got 0"),
    "criterion alone": (["--criterion=null"], r"needs both criterion and pattern"),
    "tokenizer": (["--model.shape.vocab_size=100"], r"need 2048 embeddings, the model has 100"),
    "unknown option": (["--model.num_block=2"], r"SubmoduleDistillation has no option --model.num_block"),
    "unknown scope": (["--model=Nope"], r"--model needs one of BlockDistillation, .*got Nope"),
    "empty file": (["--data.source=TextFiles", '--data.source.paths=["/dev/null"]'], r"/dev/null"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_gets_one_clear_message(wrong, tmp_path, capsys):
    options, message = WRONG[wrong]
    run_dir = tmp_path / "run"
    status = main(["fit", "-c", "scopes/submodule", "--run_dir", str(run_dir), *RANDOM, *DATA, *options])
    assert status == (2 if wrong in USAGE else 1)
    error = capsys.readouterr().err
    assert error.startswith("recon fit: error: ")
    assert re.search(message, error)
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2
    assert not (run_dir / "report.json").exists()
    assert not (run_dir / "model").exists()


def test_masks_of_another_model_are_refused(gpt2, tmp_path, capsys):
    assert main(["prune", "--run_dir", str(tmp_path / "pruned"), *RANDOM, *DATA]) == 0
    masks = str(tmp_path / "pruned" / "masks.safetensors")
    assert fit("matrix", tmp_path / "run", "--model.name", gpt2, "--masks", masks) == 1
    assert "use the masks made from this model" in capsys.readouterr().err


def test_run_dir_of_another_run_is_refused(tmp_path, capsys):
    assert fit("matrix", tmp_path / "run", *RANDOM) == 0
    assert fit("matrix", tmp_path / "run", *RANDOM, "--seed_everything=1") == 1
    error = capsys.readouterr().err
    assert "seed" in error
    assert fit("matrix", tmp_path / "run", *RANDOM, "--trainer.gradient_clip_val=1.0") == 1
    assert "options.trainer.gradient_clip_val" in capsys.readouterr().err
    assert "name another run_dir" in error


def test_a_full_disk_leaves_no_model_that_looks_whole(tmp_path, capsys, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    assert fit("matrix", tmp_path / "run", *RANDOM) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "report.json").exists()
    monkeypatch.undo()
    assert fit("matrix", tmp_path / "run", *RANDOM) == 0
    assert_complete(tmp_path / "run", "matrix")


@pytest.mark.slow
def test_sigkill_in_a_window_changes_nothing(tmp_path):
    def command(name):
        args = ["--model.epochs=3", "--run_dir", str(tmp_path / name), "--baselines=false"]
        return [sys.executable, "-m", "recon", "fit", "-c", "scopes/submodule", *RANDOM, *DATA, *args]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight = subprocess.run(command("straight"), env=environment, capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr
    slow = command("killed")
    slow[1:3] = ["-c", SLOWLY]
    process = subprocess.Popen(slow, env=environment, stdout=subprocess.DEVNULL)
    windows = tmp_path / "killed" / "windows"
    while not (windows / "000.mlp.safetensors").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {path.name: path.stat().st_mtime_ns for path in windows.glob("*.safetensors")}
    assert "001.mlp.safetensors" not in written
    again = subprocess.run(command("killed"), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert all((windows / name).stat().st_mtime_ns == when for name, when in written.items())
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "straight"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


SLOWLY = """
import sys, time
from recon.scopes.distillation import Distillation
step = Distillation.training_step
def slow(self, *args):
    time.sleep(0.1)
    return step(self, *args)
Distillation.training_step = slow
from recon.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Runs recon with a pause in every step, so that there is time to kill it in the middle of a window."""


def test_importing_and_help_stay_light():
    heavy = "{'torch', 'lightning', 'transformers', 'datasets', 'matplotlib', 'deepspeed', 'yaml', 'jsonargparse'}"
    script = f"import sys, recon, recon.cli; code = recon.cli.main(['--help']); print(code, {heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("0 set()\n")
    assert "compare" in result.stdout


def test_the_hint_of_prune_can_be_pasted(tmp_path, capsys):
    text = tmp_path / "my text.txt"
    text.write_text("".join(f"line {i} of {i * i}\n\n" for i in range(4000)))
    options = ["--criterion=sparsegpt", "--pattern=2:4", "--data.source=textfiles", "--data.source.paths", str(text)]
    directory = tmp_path / "pruned models"
    assert main(["prune", "--run_dir", str(directory), *RANDOM, *DATA, *options, "--seed_everything=3"]) == 0
    out = capsys.readouterr().out
    assert f"masks in {directory / 'masks.safetensors'}, moved weights in {directory / 'moved.safetensors'}" in out
    assert (directory / "moved.safetensors").is_file()
    command = shlex.split(out.partition("recover with: ")[2])
    assert command[:4] == ["recon", "fit", "-c", "scopes/submodule"]
    assert main([*command[1:], "--model.epochs=1", "--run_dir", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["start"] == "moved"
    assert config["model"]["init_args"]["shape"] == TIED_LLAMA
    assert config["data"]["init_args"]["source"]["init_args"]["paths"] == [str(text)]
    assert (config["seed_everything"], config["data"]["init_args"]["num_sequences"]) == (3, 8)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["criterion"], report["pattern"]) == ("sparsegpt", "2:4")
    assert main(["prune", "--run_dir", str(tmp_path / "wanda"), *RANDOM, *DATA]) == 0
    out = capsys.readouterr().out
    assert "moved" not in out.partition("masks in")[2]


def test_one_class_under_two_names_is_one_run(tmp_path, capsys):
    assert fit("matrix", tmp_path / "run", *RANDOM) == 0
    assert fit("matrix", tmp_path / "run", *RANDOM, "--criterion", "wanda") == 0
    assert "finished: nothing to do" in capsys.readouterr().out


def test_report_takes_several_runs_and_flags(tmp_path, capsys):
    for name, scope in (("a", "block"), ("b", "full")):
        report = Report(scope=scope, model="m", criterion="wanda", pattern="2:4", seed=0, perplexity=3.0)
        (tmp_path / name).mkdir()
        report.save(tmp_path / name / "report.json")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--markdown"]) == 0
    both = capsys.readouterr().out
    assert "| block |" in both
    assert "| full |" in both
    assert main(["report", "--markdown", "true", str(tmp_path / "a")]) == 0
    assert "| full |" not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), "--memory"]) == 1
    assert "memory.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
