"""Whole experts removed and the others recovered, through the real commands."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import recon
from recon.cli import main
from recon.cli.fit import main as fit
from recon.pruning.masks import Masks
from recon.pruning.patterns import Experts
from recon.pruning.whole_slices import kept_slices
from recon.report import Report
from recon.scopes import BlockDistillation, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.scopes.distillation import Windows
from recon.scopes.removal import require_recoverable
from tests.support import distributed_runs as runs
from tests.support.families import MIXTURES
from tests.support.processes import in_processes
from tests.support.scope_fixtures import trainer_of
from tests.support.slow import quick

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
CASES = [(family, scope) for family in FAMILIES for scope in ("submodule", "block", "full")]


def arguments(family: str, run: Path) -> list[str]:
    shape = {"model_type": family, "vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape |= MIXTURES[family] | {"num_hidden_layers": 2, "initializer_range": 0.2}
    sizes = {"num_sequences": 8, "seq_len": 16, "num_validation": 2, "num_test": 2, "batch_size": 4}
    text = run.parent / "text.jsonl"
    files = sorted((Path(recon.__file__).parent / "pruning").rglob("*.py"))
    text.write_text("\n".join(json.dumps({"text": file.read_text()}) for file in files))
    return [
        *("--data.source", "TextFiles", "--data.source.paths", json.dumps([str(text)])),
        *("--model.name", "random", "--model.shape", json.dumps(shape), "-c", "patterns/experts"),
        *(part for name, size in sizes.items() for part in (f"--data.{name}", str(size))),
        *(
            "--model.epochs",
            "1",
            "--model.lr",
            "1e-2",
            "--model.save_dtype",
            "float32",
            "--drift",
            "false",
            "--summary",
            "false",
        ),
        *("--run_dir", str(run), "--trainer.logger", "false"),
    ]


def loaded(run: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")


def assert_smaller(run: Path) -> dict[str, torch.Tensor]:
    """The written model has three of four experts, and none is zero; return its weights."""
    report, masks = Report.load(run / "report.json"), Masks.load(run / "masks.safetensors")
    assert (report.sparsity, report.mask_violations) == (0.25, 0)
    weights = dict(loaded(run).named_parameters())
    for name in masks:
        survivors = kept_slices(masks, name)
        assert survivors is not None
        assert len(survivors) == len(weights[name]) == 3
        assert all(one.any() for one in weights[name])
    assert main(["verify", str(run)]) == 0
    return weights


@pytest.mark.parametrize(("family", "scope"), quick(CASES, ("qwen3_moe", "submodule")))
def test_a_smaller_mixture_is_recovered_and_loads(family: str, scope: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", f"scopes/{scope}", *arguments(family, run)]) == 0
    assert_smaller(run)
    report = Report.load(run / "report.json")
    assert report.pattern == "75% of experts"
    card = (run / "model/README.md").read_text()
    assert "removed experts are not in it" in card
    assert "zeros" not in card.partition("## Verification")[0]
    assert report.prediction["reason"].startswith("planning knows patterns of weights")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["submodule", "block", "full"])
def test_routers_alone_learn(scope: str, tmp_path: Path) -> None:
    pruned, run = tmp_path / "pruned", tmp_path / "run"
    more = ["--model.parameters", "routers", "--baselines", "false"]
    more += ["--model.keep_best", "false"] if scope == "full" else []
    assert main(["fit", "-c", f"scopes/{scope}", *arguments("qwen3_moe", run), *more]) == 0
    assert main(["fit", "-c", f"scopes/{scope}", *arguments("qwen3_moe", pruned), *more, "--model.lr", "1e-30"]) == 0
    weights, start = assert_smaller(run), assert_smaller(pruned)
    moved = {name for name, one in weights.items() if not torch.equal(one, start[name])}
    routers = {name for name in weights if name.endswith("mlp.gate.weight")}
    assert moved
    assert moved <= routers if scope != "full" else moved == routers


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        (MatrixReconstruction(), "got the matrix scope"),
        (SubmoduleDistillation(start="exact"), "got model.start: exact"),
        (BlockDistillation(compile=True), "got model.compile: true"),
        (SubmoduleDistillation(windows=Windows([["*.q_proj"]])), "got model.windows"),
    ],
)
def test_what_cannot_recover_is_refused(scope: Scope, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_recoverable(scope, trainer_of())


@pytest.mark.slow
def test_a_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shape = json.dumps({"model_type": "qwen3_moe", "vocab_size": 64, **MIXTURES["qwen3_moe"]})
    given = ["-c", "scopes/block", "-c", "patterns/experts", "--model.name", "random", "--model.shape", shape]
    assert main(["plan", *given]) != 0
    assert "planning knows patterns of weights" in capsys.readouterr().err


@pytest.mark.slow
def test_other_commands_say_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", "scopes/submodule", *arguments("qwen3_moe", run)]) == 0
    capsys.readouterr()
    assert main(["test", str(run), "--run_dir", str(tmp_path / "tested")]) == 0
    assert Report.load(tmp_path / "tested/report.json").perplexity == Report.load(run / "report.json").perplexity
    more = ["-c", "scopes/full", *arguments("qwen3_moe", tmp_path / "next"), "--from", str(run)]
    assert main(["fit", *more]) != 0
    assert f"--model.name {run / 'model'}" in " ".join(capsys.readouterr().err.split())
    assert main(["speed", str(run)]) != 0
    assert "whose model has lost whole experts" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_live_model_gives_masks_and_is_not_recovered(tmp_path: Path) -> None:
    run, text = tmp_path / "run", [path.read_text() for path in Path("recon").rglob("*.py")]
    assert main(["fit", "-c", "scopes/submodule", *arguments("qwen3_moe", run)]) == 0
    model, tokenizer = loaded(run), AutoTokenizer.from_pretrained(run / "model")
    options = {"data.num_sequences": 8, "data.seq_len": 16, "data.num_validation": 2, "data.num_test": 2}
    given = {"criterion": "frequency", "pattern": Experts(0.67), "text": text, "options": options}
    masks = recon.prune(model, tokenizer, **given)
    assert kept_slices(masks, "model.layers.0.mlp.experts.down_proj") is not None
    for start in ({"masks": masks, "text": text, "options": options}, given):
        with pytest.raises(ValueError, match="a live model, whose parameters keep their shapes: save it"):
            recon.recover(model, tokenizer, **start)


@pytest.mark.slow
@pytest.mark.parametrize("propagation", ["dense", "recovered"])
def test_an_interrupted_run_ends_at_the_same_bits(propagation: str, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    more = ["--model.propagation", propagation, "--baselines", "false"]
    command = {run: ["-c", "scopes/submodule", *arguments("mixtral", run), *more] for run in (stopped, whole)}
    with pytest.raises(RuntimeError, match="the test says stop"):
        runs.main_with(runs.Fail(2), command[stopped])
    assert list(stopped.glob("windows/*.safetensors"))
    for run in (stopped, whole):
        assert main(["fit", *command[run]]) == 0
    assert runs.same(runs.weights(stopped), runs.weights(whole))
    assert_smaller(stopped)


@pytest.mark.slow
def test_an_offloaded_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    for place in ("none", "host"):
        command = ["fit", "-c", "scopes/submodule", *arguments("mixtral", tmp_path / place), "--model.offload", place]
        assert main(command) == 0
    assert runs.same(runs.weights(tmp_path / "none"), runs.weights(tmp_path / "host"))
    assert_smaller(tmp_path / "host")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes(strategy: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.batch_size", "2"]
    command = ["-c", "scopes/full", *arguments("mixtral", run), "-c", f"strategies/{strategy}", *more]
    if strategy in ("zero1", "zero2"):
        in_processes(fit, command)
        assert_smaller(run)
    else:
        with pytest.raises(Exception, match="shards the parameters that a mixture selects from"):
            in_processes(fit, command)
