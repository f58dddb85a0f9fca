"""Bad input to every command: one message with requirement, what was received, place and cure; no traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recon.basics.manifest import Manifest
from recon.cli import main
from recon.cli.configs import load_config, load_options
from recon.experiment import checkpoints
from recon.experiment.consolidation import load_file as load_checkpoint
from recon.experiment.directory import RunDirectory
from recon.models.loading import ModelSource
from recon.models.windows import BlockWindow
from recon.scopes import BlockDistillation, FullRetraining
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.optimization import LRSchedulerRecipe, OptimizerRecipe
from tests.support.families import tiny

FIT = ["fit", "-c", "scopes/submodule"]


def refused(args: list[str], capsys: pytest.CaptureFixture[str], *said: str) -> str:
    """Expect a command to end with a message that has all of `said`."""
    assert main(args) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"recon {args[0]}: error: ")
    for one in said:
        assert one in error, error
    return error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.accelerator=gpu"], ["trainer.accelerator: gpu", "this machine", "leave them out"]),
        (["--trainer.accelerator=zz"], ["trainer.accelerator: zz", "leave them out"]),
        (["--trainer.accelerator=cpu", "--trainer.devices=[1]"], ["trainer.devices: [1]", "leave them out"]),
        (["--trainer.devices=-3", "--trainer.accelerator=cpu"], ["trainer.devices: -3"]),
        (["--trainer.strategy=zz"], ["trainer.strategy: zz", "leave them out"]),
        (["--seed_everything=-1"], ["--seed_everything must be from 0 to 4294967295, got -1"]),
        (["--seed_everything=99999999999"], ["--seed_everything must be from 0", "got 99999999999"]),
        (["--pattern=-0.5"], ["--pattern needs a sparsity from 0 to below 100%", "got -0.5"]),
        (["--windows=3/2"], ["--windows needs one part of several", "got '3/2'", "give its number"]),
        (["--model.lr=-1"], ["model.lr must be above 0 and finite, or auto, got -1"]),
        (["--model.windows.groups=[['*.x']]", "--model.propagation=recovered"], ["choose model.propagation: dense"]),
        (["--trainer.max_steps=0"], ["trainer.max_steps, got 0", "nothing would be trained"]),
        (["--trainer.limit_train_batches=0"], ["trainer.limit_train_batches, got 0", "nothing would be trained"]),
        (["--trainer.val_check_interval=0"], ["trainer.val_check_interval, got 0", "leave it out"]),
        (["--pruning.batch_size=0"], ["pruning.batch_size must be at least 1, got 0"]),
    ],
)
def test_options_of_a_fit(
    options: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options == ["--trainer.accelerator=gpu"] and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    refused([*FIT, f"--run_dir={tmp_path / 'run'}", *options], capsys, *said)
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing was pruned


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "cuda:99"])
def test_devices_that_are_not_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["prune", "--device", device, f"--run_dir={tmp_path / 'run'}"], capsys, f"{device}", "; ", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    error = refused([*FIT, "--run_dir", str(tmp_path / "file" / "run")], capsys, "run_dir needs a directory", "another")
    assert str(tmp_path / "file") in error


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"warmup": 1.5}],
)
def test_rates_out_of_range(options: dict) -> None:
    for scope in (BlockDistillation, FullRetraining):
        with pytest.raises(ValueError, match=rf"model\.{next(iter(options))} must be .*, got .*; correct it"):
            scope(**options)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "said"),
    [
        (OptimizerRecipe(torch.optim.AdamW, {"lr": -1.0}), None, "--optimizer .* got lr -1.0: .*; correct"),
        (OptimizerRecipe(torch.optim.AdamW, {"zz": 1.0}), None, "--optimizer needs options that AdamW takes, got zz"),
        (
            None,
            LRSchedulerRecipe(torch.optim.lr_scheduler.StepLR, {"step_size": 0}),
            "--lr_scheduler needs options that StepLR takes, got step_size 0",
        ),
    ],
)
def test_optimizers_and_schedules_are_tried_first(
    optimizer: OptimizerRecipe | None, schedule: LRSchedulerRecipe | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        FullRetraining().choose_optimizer(optimizer, schedule)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing", "is empty"),
        ("[1]", "holds a list"),
        ("{", "expected the node content"),
        ("model: {lr: 1}\nmodel: {lr: 2}", "the key 'model' stands twice"),
        ("model: {lr: 1, lr: 2}", "the key 'lr' stands twice"),
        ("model: !!python/object:os.system x", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "expected a single document"),
    ],
)
def test_configurations(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    refused(["prune", "-c", str(file)], capsys, "-c needs a YAML file", str(file), said, "; correct it")


def test_a_merged_key_may_be_written_again(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("a: &one {lr: 1, epochs: 2}\nb: {<<: *one, lr: 3}")
    assert load_config(str(file))["b"] == {"lr": 3, "epochs": 2}


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "data: 3"])
def test_options_of_a_run(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a run directory needs the options of the run, got .*config.yaml.*; restore"):
        load_options(tmp_path / "config.yaml", ["data"])


def recorded(file: Path, text: str, run: Path) -> None:
    """Write a file as a version of recon that wrote this would have."""
    with Manifest(run).writing(file) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": {}}'])
def test_fingerprints(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    recorded(tmp_path / "model" / "config.json", "{}", tmp_path)
    recorded(tmp_path / "fingerprint.json", text, tmp_path)
    refused(["test", str(tmp_path)], capsys, str(tmp_path / "fingerprint.json"), "run again in a new run_dir")


@pytest.mark.parametrize(
    ("part", "said"), [("x", "Expecting value"), ("[]", "holds a list"), ('{"seconds": 3}', "at_least, resumed, peaks")]
)
def test_parts_of_windows(part: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "parts" / "001-of-002" / "part.json"
    recorded(file, part, tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        RunDirectory(tmp_path, None).read_parts()
    assert str(file) in str(error.value)


@pytest.mark.parametrize("marker", ["x", "[]", "{}"])
def test_markers_of_checkpoints(marker: str, tmp_path: Path) -> None:
    (tmp_path / "step-000001.json").write_text(marker)
    with pytest.raises(ValueError, match=r"a checkpoint needs a .*step-000001\.json.*delete .* to begin anew"):
        checkpoints.step_of(tmp_path / "step-000001.ckpt")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda file: file.write_bytes(b"x"), "damaged"),
        (lambda file: torch.save([1], file), "without state_dict, made by another version"),
        (lambda file: torch.save({"epoch": 1}, file), "without state_dict, made by another version"),
    ],
)
def test_checkpoints(write: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    file = tmp_path / "step-000001.ckpt"
    write(file)
    with pytest.raises(ValueError, match=rf"a checkpoint needs .*step-000001\.ckpt.*{said}.*to begin anew"):
        load_checkpoint(file, ("state_dict", "epoch"))
    with pytest.raises(ValueError, match=r"needs the cost so far, got one without `tally`"):
        FullRetraining().on_load_checkpoint({})


def of_version(file: Path, drop: str) -> None:
    with safe_open(file, framework="pt") as opened:
        result = json.loads(opened.metadata()["result"])
    del result[drop]
    save_file(load_file(file), file, {"result": json.dumps(result)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"x"),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: save_file(load_file(file), file),
        lambda file: save_file(load_file(file), file, {"result": "[]"}),
        lambda file: of_version(file, "tokens"),
        lambda file: of_version(file, "seconds"),
        lambda file: save_file(
            {name: torch.zeros(2) for name in load_file(file)},
            file,
            {"result": '{"before": 1, "after": 1, "tokens": 1, "seconds": 1}'},
        ),
    ],
)
def test_window_files(damage: Callable[[Path], object], tmp_path: Path) -> None:
    model, files = tiny("llama"), WindowFiles(tmp_path)
    window = BlockWindow("000", [], ["model.norm.weight"], [])
    files.write(window, model, {"before": 1.0, "after": 0.5, "tokens": 8, "seconds": 1.0})
    assert files.load(window, model)["tokens"] == 8
    damage(files.path(window))
    with pytest.raises(ValueError, match=r"a recovered window needs .*000\.safetensors.*delete it to recover"):
        files.load(window, model)


def rewritten_config(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: rewritten_config(model, hidden_size=64, head_dim=8), "others in .*; correct config.json"),
        (lambda model: rewritten_config(model, num_hidden_layers=4), "which lacks 9 of .* the first; copy it again"),
        (lambda model: (model / "config.json").write_text("{"), "could not be read as AutoConfig: .*; copy the model"),
        (lambda model: rewritten_config(model, num_attention_heads=0), "; copy the model again"),
    ],
)
def test_model_directories(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=said):
        ModelSource(str(tmp_path / "model")).model()


@pytest.mark.parametrize("changes", [{"hidden_size": 0}, {"num_attention_heads": 0}, {"hidden_size": "x"}])
def test_shapes(changes: dict[str, object]) -> None:
    shape = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, **changes}
    for make in (lambda source: source.model(), lambda source: source.skeleton()):
        with pytest.raises(ValueError, match=r"model\.shape needs the configuration .* got one that makes none: .*;"):
            make(ModelSource("random", shape))


COMPARISON = {"name": "x", "recoveries": [{"scope": "matrix"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recoveries": [{"scope": "block", "config": ["scopes/zz"]}]}, ["'block' cannot run", "scopes/zz"]),
        ({"recoveries": [{"scope": "zz", "config": ["scopes/matrix"]}]}, ["needs one of matrix", "got 'zz'"]),
        ({"models": [{"name": "bundled", "zz": 1}]}, ["models", "zz", "name, shape, dtype"]),
        ({"models": ["bundled"]}, ["models"]),
        ({"recoveries": [{"scope": "submodule", "options": {"model.lr": -1}}]}, ["model.lr must be above 0", "got -1"]),
        ({"options": {"trainer.accelerator": "mps"}}, ["'matrix' cannot run", "trainer.accelerator: mps"]),
        ({"recoveries": [{"scope": "submodule", "tune": {"model.lr": [-1]}}]}, ["model.lr must be above 0", "got -1"]),
    ],
)
def test_comparisons(changes: dict, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(COMPARISON | {"directory": str(tmp_path / "runs")} | changes))
    refused(["compare", "-c", str(file)], capsys, *said)
    assert not (tmp_path / "runs").exists()
