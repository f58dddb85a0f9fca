"""recon from Python, as a new user tries it: a live model, in place, with the weights that the command gives."""

import copy
import itertools
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

import recon
from recon.cli import main
from recon.cli.api import PrunedMasks
from recon.data import TextFiles
from recon.models.loading import ModelSource
from recon.pruning.masks import Masks
from tests.support.slow import quick

SMALL: dict[str, Any] = {"data.num_sequences": 8, "data.seq_len": 32, "data.num_validation": 4, "data.num_test": 4}
TEXT = [f"def add_{i}(a, b):\n    # {i * 7919 % 999}\n    return a * {i} + b - {i}\n" * 2 for i in range(600)]

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def bundled() -> Pair:
    return ModelSource().load()


def gpt2() -> Pair:
    """Built in memory: Conv1D weights and a tied head, in training mode as the constructor leaves it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    return model, ModelSource().load_tokenizer()


MODELS = {"bundled": bundled, "gpt2": gpt2}


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def command_line(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    """Saves a model and the text, and returns the options by which a command finds them."""

    def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "dense")
        lines = [json.dumps({"text": one}) for one in TEXT]
        (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
        source = {"class_path": "recon.data.TextFiles", "init_args": {"paths": [str(tmp_path / "text.jsonl")]}}
        return ["--model.name", str(tmp_path / "dense"), f"--data.source={json.dumps(source)}", *command_line(SMALL)]

    return save


@pytest.mark.parametrize(
    ("scope", "kind"),
    quick(itertools.product(("matrix", "submodule", "full"), MODELS), ("submodule", "gpt2")),
)
def test_the_ten_lines_give_what_the_commands_give(kind: str, scope: str, on_disk: Any, tmp_path: Path) -> None:
    model, tokenizer = MODELS[kind]()
    common = on_disk(model, tokenizer)
    dense, pruned, run = weights_of(model), tmp_path / "pruned", tmp_path / "run"
    epochs = {} if scope == "matrix" else {"model.epochs": 1}
    assert main(["prune", "--run_dir", str(pruned), *common, "--pattern=recon.patterns.NM"]) == 0
    fit = ["fit", "-c", f"scopes/{scope}", "--run_dir", str(run), *common, "--masks", str(pruned / "masks.safetensors")]
    assert main([*fit, *command_line(epochs), "--trainer.accelerator=cpu"]) == 0

    masks = recon.prune(model, tokenizer, criterion="wanda", pattern="2:4", text=TEXT, options=SMALL)
    assert isinstance(masks, Masks)
    assert masks == Masks.load(pruned / "masks.safetensors")
    assert same(weights_of(model), dense)  # left as it was
    report = recon.recover(model, tokenizer, masks, scope=scope, text=TEXT, options=SMALL | epochs)

    written = json.loads((run / "report.json").read_text())
    expected = load_file(run / "model" / "model.safetensors")
    found = weights_of(model)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert not same(found, dense)
    assert masks.violations(model) == 0
    for name in ("perplexity", "dense_perplexity", "pruned_perplexity", "sparsity", "criterion", "pattern", "drift"):
        assert getattr(report, name) == written[name], name
    assert report.peaks["host"] > 0
    assert report.run_dir == ""


def test_a_configuration_refines_masks_as_the_command_does(on_disk: Any, tmp_path: Path) -> None:
    model, tokenizer = gpt2()
    common, run = on_disk(model, tokenizer), tmp_path / "pruned"
    quick = ["--baselines=false", "--drift=false", "--summary=false"]
    assert main(["prune", "-c", "refine/swaps", "--run_dir", str(run), *common, *quick, "--pattern=50%"]) == 0
    masks = recon.prune(model, tokenizer, "wanda", 0.5, text=TEXT, options=SMALL, config="refine/swaps")
    assert isinstance(masks, PrunedMasks)
    assert masks == Masks.load(run / "masks.safetensors")
    assert masks.moved is not None
    assert json.loads((run / "report.json").read_text())["criterion"] == "wanda + swaps"
    plain = recon.prune(model, tokenizer, "wanda", 0.5, text=TEXT, options=SMALL)
    assert plain != masks
    assert all(torch.equal(plain[name].sum(0), keep.sum(0)) for name, keep in masks.items())  # Conv1D: in x out


def test_a_model_keeps_its_parameters_modes_and_precision_and_the_process_its_state() -> None:
    model, tokenizer = gpt2()
    model = model.to(torch.bfloat16).train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    model.lm_head.weight.grad = gradient = torch.ones_like(model.lm_head.weight)
    before = {name: id(one) for name, one in model.named_parameters(remove_duplicate=False)}
    modules, config = dict(model.named_modules()), copy.deepcopy(model.config.to_dict())
    level, filters, state = logging.getLogger("lightning.fabric").level, list(warnings.filters), torch.get_rng_state()
    recon.recover(
        model,
        tokenizer,
        scope="full",
        text=TEXT,
        criterion="magnitude",
        pattern="50%",
        options=SMALL | {"model.epochs": 1, "model.parameters": "lora", "model.gradient_checkpointing": True},
        baselines=False,
        drift=False,
    )
    assert {name: id(one) for name, one in model.named_parameters(remove_duplicate=False)} == before
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not frozen.requires_grad
    assert model.lm_head.weight.grad is gradient
    assert model.transformer.h[0].mlp.c_fc.weight.requires_grad
    assert (logging.getLogger("lightning.fabric").level, list(warnings.filters)) == (level, filters)
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.isfinite()


def test_moved_weights_come_with_masks_and_recovery_starts_from_them(tmp_path: Path) -> None:
    model, tokenizer = gpt2()
    masks = recon.prune(model, tokenizer, recon.criteria.SparseGPT(), recon.patterns.NM(2, 4), text=TEXT, options=SMALL)
    moved: Any = masks.moved  # type: ignore[attr-defined]
    assert moved.keys() == masks.keys()
    file = masks.file  # type: ignore[attr-defined]
    start: dict[str, torch.Tensor] = dict(moved)
    untrained = {"model.lr": 1e-12, "model.epochs": 1}
    report = recon.recover(model, tokenizer, masks, text=TEXT, start="moved", options=SMALL | untrained)
    assert (report.criterion, report.pattern) == ("sparsegpt", "2:4")
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in start.items())
    assert file.exists()
    del masks, moved
    assert not file.parent.exists()  # gone with the masks


def test_masks_in_memory_need_no_file() -> None:
    model, tokenizer = gpt2()
    names = [name for name, _ in model.named_parameters() if name.endswith("c_fc.weight")]
    masks = Masks({name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in names})
    report = recon.recover(model, tokenizer, masks, scope="matrix", text=TEXT, options=SMALL, baselines=False)
    assert (report.criterion, report.dense_perplexity, report.mask_violations) == ("given masks", None, 0)
    assert masks.violations(model) == 0
    model, tokenizer = gpt2()
    changed = recon.prune(model, tokenizer, "random", 0.5, text=TEXT, options=SMALL)
    changed.add(Masks({names[0]: torch.ones_like(masks[names[0]])}))  # no longer what its file holds
    recon.recover(model, tokenizer, changed, scope="matrix", text=TEXT, options=SMALL, baselines=False, drift=False)
    assert torch.count_nonzero(model.get_parameter(names[0])) == masks[names[0]].numel()


def test_a_run_directory_stays_and_can_be_used_by_commands(tmp_path: Path, capsys: Any) -> None:
    model, tokenizer = gpt2()
    run, call = tmp_path / "run", {"scope": "matrix", "text": TEXT, "options": SMALL, "baselines": False}
    again = copy.deepcopy(model)
    report = recon.recover(model, tokenizer, run_dir=run, **call)
    assert report.run_dir == str(run)
    assert (run / "config.yaml").exists()
    assert recon.recover(again, tokenizer, run_dir=run, **call).perplexity == report.perplexity  # finished: taken
    assert same(weights_of(again), weights_of(model))
    with pytest.raises(ValueError, match=r"whose run differs in model\.weights"):
        recon.recover(model, tokenizer, run_dir=run, **call)  # no longer the dense model
    assert main(["test", str(run), "--run_dir", str(tmp_path / "tested")]) == 0
    assert json.loads((tmp_path / "tested" / "report.json").read_text())["perplexity"] == report.perplexity


@pytest.mark.parametrize("offload", quick(["host", "disk"], "host"))
def test_an_offloaded_model_is_recovered_in_place_too(offload: str) -> None:
    recovered = []
    for options in ({}, {"model.offload": offload}):
        model, tokenizer = gpt2()
        call: dict[str, Any] = {"options": SMALL | {"model.epochs": 1} | options, "baselines": False, "drift": False}
        recon.recover(model, tokenizer, text=TEXT, validation_text=TEXT[:50], test_text=TEXT[50:99], **call)
        recovered.append(weights_of(model))
    assert same(*recovered)


@pytest.mark.slow
def test_a_data_source_and_configurations_are_taken(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in TEXT))
    source = TextFiles([str(tmp_path / "text.jsonl")])
    found = []
    for text in (TEXT, source):
        model, tokenizer = gpt2()
        call: dict[str, Any] = {"scope": "submodule_best", "config": "criteria/ria", "baselines": False}
        report = recon.recover(model, tokenizer, text=text, options=SMALL | {"model.epochs": 1}, **call)
        assert (report.criterion, report.label) == ("ria", "submodule (recovered)")
        found.append(weights_of(model))
    assert same(*found)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one document": ({"text": TEXT[:1]}, r"split of the documents in text, validation_text and test_text"),
    "a string": ({"text": "abc"}, "text needs a list of strings, one a document, got str"),
    "no document": ({"text": []}, "text needs at least one document"),
    "a typo": ({"options": {"model.epoch": 2}}, "epoch"),
    "a criterion": ({"criterion": "wonda"}, "Wanda"),
    "a precision": ({"options": {"model.dtype": "bfloat16"}}, "in its own precision"),
    "processes": ({"options": {"trainer.devices": 2, "trainer.strategy": "ddp"}}, "runs in this process"),
    "half a pruning": ({"options": {"pattern": None}}, "both criterion and pattern"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_say_what_is_needed_and_leave_the_model(wrong: str) -> None:
    model, tokenizer = gpt2()
    before = weights_of(model)
    given, message = WRONG[wrong]
    call = {"scope": "full", "text": TEXT, "options": SMALL} | given
    with pytest.raises(ValueError, match=message):
        recon.recover(model, tokenizer, **call)
    assert same(weights_of(model), before)


def test_a_call_that_fails_in_training_leaves_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = gpt2()
    before, changed = weights_of(model), []

    def fail(*args: Any, **more: Any) -> None:
        changed.append(not same(weights_of(model), before))
        raise OSError("no space")

    monkeypatch.setattr("recon.experiment.writing.save_model", fail)
    with pytest.raises(OSError, match="no space"):
        recon.recover(model, tokenizer, scope="matrix", text=TEXT, options=SMALL, baselines=False)
    assert changed == [True]  # by then it was recovered
    assert same(weights_of(model), before)


def test_nothing_is_printed_and_everything_is_logged(capsys: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = gpt2()
    recon.prune(model, tokenizer, text=TEXT, options=SMALL)
    recon.recover(model, tokenizer, scope="block", text=TEXT, options=SMALL | {"model.epochs": 1, "model.lr": 1e-4})
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == []
    caplog.set_level(logging.INFO, "recon")
    recon.prune(model, tokenizer, "magnitude", "50%", text=TEXT, options=SMALL)
    assert [line.split("  ")[1] for line in caplog.messages] == ["block 1/2", "block 2/2"]


def test_importing_recon_is_quick_and_imports_no_framework() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import recon; recon.__version__;"
        "print(time.perf_counter() - started, *({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(out) == 1
    assert float(out[0]) < 0.5
