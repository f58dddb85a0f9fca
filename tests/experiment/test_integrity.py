"""Mutations of every kind of artefact: each is noticed by what reads it, and ends in the same bits or in a refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recon.basics.manifest import NAME, require_unchanged
from recon.basics.run_paths import RunPaths
from recon.cli import main
from recon.experiment import checkpoints
from recon.experiment.comparison import cell
from recon.experiment.directory import RunDirectory
from recon.experiment.verification import verify
from recon.pruning.masks import Masks
from recon.report import Report, Results
from tests.support.slow import slow

SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, tie_word_embeddings: true}"
)
MODEL = ["--model.name=random", f"--model.shape={SHAPE}"]
TEXT = Path(mkdtemp(prefix="recon-integrity-")) / "text.jsonl"
DATA = ["--data.source=recon.data.TextFiles", f"--data.source.paths=[{TEXT}]"]
DATA += ["--data.num_sequences=4", "--data.seq_len=32", "--data.num_validation=2", "--data.num_test=2"]
COMMON = [*MODEL, *DATA, "--pattern=2:4", "--summary=false", "--drift=false", "--baselines=false"]
FIT = ["fit", *COMMON, "--trainer.logger=false", "--trainer.callbacks=null"]

COMMANDS: dict[str, list[str]] = {
    "prune": ["prune", *COMMON, "--criterion=sparsegpt", "--save_model=true"],
    "matrix": [*FIT, "-c", "scopes/matrix"],
    "offloaded": [*FIT, "-c", "scopes/matrix", "--model.offload=disk"],
    "full": [*FIT, "-c", "scopes/full", "--model.epochs=1", "--model.start=exact", "--data.batch_size=2"],
}
COMMANDS["full"] += ["--checkpoint_every_n_steps=1"]
COMPARISON = ["compare", "--name=one", "--recoveries=[{scope: matrix, options: {drift: false}}]"]
COMPARISON += ["--patterns=[{class_path: recon.patterns.NM}]", f"--models=[{{name: random, shape: {SHAPE}}}]"]
COMPARISON += ["--data={num_sequences: 4, seq_len: 32, num_validation: 2, num_test: 2}"]


def write_text() -> None:
    """A few documents: the bundled text takes as long to tokenise as a run of these models."""
    words = [f"word{number % 7} is {number}. " for number in range(400)]
    documents = ["".join(words[first : first + 40]) for first in range(0, 400, 8)]
    TEXT.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))


def killed(*_: Any) -> None:
    raise OSError("killed")


def in_this_process(one: cell.Cell, *options: Any) -> str | None:
    """In place of the child process of a cell, whose imports take seconds."""
    return None if main(one.command) == 0 else "failed"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have ended, runs that were stopped before their model was written, and a comparison."""
    root = tmp_path_factory.mktemp("made")
    write_text()
    for name, command in COMMANDS.items():
        if name != "offloaded":  # its bits are those of the matrix scope
            assert main([*command, "--run_dir", str(root / name)]) == 0
        if name in ("offloaded", "full"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("recon.experiment.recovery.write", killed)
                assert main([*command, "--run_dir", str(root / f"killed-{name}")]) == 1
    assert main([*COMMANDS["matrix"], "--seed_everything=1", "--run_dir", str(root / "other")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell, "_run", in_this_process)
        without_pictures(patch)
        assert main([*COMPARISON, "--directory", str(root / "comparison")]) == 0
    return root


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    for name in ("draw_pareto", "draw_drift"):
        patch.setattr(f"recon.cli.compare.{name}", lambda *_: [])


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of the runs to a new directory."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made / name, tmp_path / name))

    return copy


def flip(at: float) -> Callable[[Path, Path], None]:
    """A mutation of one bit, at a share of the file's length."""

    def mutate(file: Path, _: Path) -> None:
        content = bytearray(file.read_bytes())
        content[min(int(at * len(content)), len(content) - 1)] ^= 1
        file.write_bytes(content)

    return mutate


def cut(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def delete(file: Path, _: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    shutil.copy(other, file)


MUTATIONS: dict[str, Callable[[Path, Path], None]] = {
    "first bit": flip(0),
    "header": flip(0.01),
    "middle": flip(0.5),
    "end": flip(1),
    "cut": cut,
    "empty": empty,
    "deleted": delete,
    "swapped": swap,
}


def unfinished(run: Path, file: Path) -> bool:
    return not RunDirectory(run, None).is_finished


def not_intact(run: Path, file: Path) -> bool:
    """As windows, masks, dense and start weights are asked for before they are used."""
    product = file.parent if file.parent.name in ("dense", "model") else file
    return not RunPaths(run).manifest.is_intact(product)


def no_masks(run: Path, file: Path) -> bool:
    return not RunDirectory(run, None).has_masks


def refused(read: Callable[[Path, Path], Any]) -> Callable[[Path, Path], bool]:
    """Whether a reading function refuses the file by name."""

    def check(run: Path, file: Path) -> bool:
        try:
            read(run, file)
        except (ValueError, FileNotFoundError) as error:
            return file.name in str(error)
        return False

    return check


def checkpoint_of(run: Path, file: Path) -> None:
    found = checkpoints.last(run / "checkpoints")
    assert found is not None
    checkpoints.require_intact(found)


Reader = Callable[[Path, Path], bool]
ARTEFACTS: dict[str, tuple[Reader, str]] = {
    "matrix/model/model.safetensors": (unfinished, "other"),
    "matrix/model/config.json": (unfinished, "prune/report.json"),
    "matrix/model/tokenizer.json": (unfinished, "prune/model/config.json"),
    "matrix/masks.safetensors": (unfinished, "prune"),
    "matrix/report.json": (unfinished, "other"),
    "matrix/windows/000.safetensors": (not_intact, "other"),
    "matrix/config.yaml": (refused(lambda run, file: RunPaths(run).manifest.require(file, "")), "other"),
    "killed-offloaded/windows/001.safetensors": (not_intact, "other"),
    "killed-offloaded/dense/model.safetensors": (not_intact, "matrix/model/model.safetensors"),
    "killed-offloaded/dense/config.json": (not_intact, "prune/report.json"),
    "killed-offloaded/masks.safetensors": (no_masks, "prune"),
    "killed-full/start.safetensors": (not_intact, "prune/moved.safetensors"),
    "killed-full/checkpoints/step-000002.ckpt": (refused(checkpoint_of), "matrix/report.json"),
    "killed-full/checkpoints/step-000002.json": (refused(checkpoint_of), "matrix/report.json"),
    "prune/masks.safetensors": (refused(lambda run, file: require_unchanged(file, "")), "matrix"),
    "prune/moved.safetensors": (no_masks, "killed-full/start.safetensors"),
    "comparison/results.json": (refused(lambda run, file: Results.load(run)), "matrix/report.json"),
    "comparison/matrix-*/report.json": (refused(lambda run, file: Report.load(file)), "other"),
    "comparison/matrix-*/memory.json": (refused(lambda run, file: require_unchanged(file, "")), "matrix/report.json"),
    "comparison/matrix-*/model/model.safetensors": (lambda run, file: unfinished(file.parents[1], file), "other"),
}
"""Artefact -> how what reads it asks for it, and the run or file to swap it with."""


def test_there_are_enough_mutations() -> None:
    assert len(ARTEFACTS) * len(MUTATIONS) + len(WHOLE) >= 60


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_each_mutation_is_noticed_by_the_reader_and_by_verify(
    artefact: str, made: Path, copied: Callable[[str], Path]
) -> None:
    name, _, within = artefact.partition("/")
    run = copied(name)
    (file,) = run.glob(within)
    reader, other = ARTEFACTS[artefact]
    stranger = made / other if (made / other).is_file() else made / other / within.removeprefix("matrix-*/")
    assert stranger.is_file()
    held = file.read_bytes()
    for mutation, mutate in MUTATIONS.items():
        assert not reader(run, file), f"refused though it is whole, before {mutation}"
        mutate(file, stranger)
        assert reader(run, file), mutation
        assert any(str(file) in fault for fault in verify(run).faults), mutation
        file.write_bytes(held)


WHOLE = [
    ("matrix", "masks.safetensors", "middle", "same"),
    ("matrix", "report.json", "empty", "same"),
    slow("matrix", "fingerprint.json", "middle", "same"),
    ("matrix", NAME, "first bit", "refused"),
    ("matrix", NAME, "middle", "either"),
    slow("matrix", NAME, "deleted", "refused"),
    ("matrix", NAME, "swapped", "refused"),
    ("killed-offloaded", "windows/000.safetensors", "end", "same"),
    ("killed-offloaded", "dense/model.safetensors", "middle", "same"),
    slow("killed-offloaded", "masks.safetensors", "swapped", "same"),
    ("killed-full", "checkpoints/step-000002.ckpt", "middle", "refused"),
    ("killed-full", "start.safetensors", "middle", "same"),
    ("full", "model/model.safetensors", "end", "refused"),
    ("prune", "masks.safetensors", "middle", "same"),
    ("prune", "moved.safetensors", "empty", "same"),
    slow("prune", "model/model.safetensors", "swapped", "same"),
]
"""Run, artefact, mutation, and the end of the command that reads it."""


@pytest.mark.parametrize(("name", "within", "mutation", "end"), WHOLE)
def test_the_command_ends_in_the_same_bits_or_names_the_file(
    name: str, within: str, mutation: str, end: str, made: Path, copied: Callable[[str], Path], capsys: Any
) -> None:
    run, straight = copied(name), made / {"killed-offloaded": "matrix", "killed-full": "full"}.get(name, name)
    MUTATIONS[mutation](run / within, made / "other" / within)
    code = main([*COMMANDS[name.removeprefix("killed-")], "--run_dir", str(run)])
    said = capsys.readouterr()
    if end == "refused" or (end == "either" and code):
        assert code == 1
        assert Path(within).name in said.err
        return
    assert code == 0, said.err
    for file in ("model/model.safetensors", "masks.safetensors"):
        ours, theirs = load_file(run / file), load_file(straight / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert end == "either" or verify(run).faults == []


def test_an_emptied_model_is_no_finished_run(copied: Callable[[str], Path], capsys: Any) -> None:
    for name, code in (("matrix", 0), ("full", 1)):
        run = copied(name)
        for file in (run / "model").iterdir():
            file.unlink()
        assert main([*COMMANDS[name], "--run_dir", str(run)]) == code
        assert "model/config.json is missing" in "".join(capsys.readouterr())


def test_a_window_is_needed_to_write_a_damaged_model_again(copied: Callable[[str], Path], capsys: Any) -> None:
    run = copied("matrix")
    for within in ("model/model.safetensors", "windows/001.safetensors"):
        flip(0.5)(run / within, run)
    assert main([*COMMANDS["matrix"], "--run_dir", str(run)]) == 1
    said = capsys.readouterr().err
    assert "model/model.safetensors" in said
    assert "windows/001.safetensors" in said


def test_commands_that_only_read_refuse_by_name(copied: Callable[[str], Path], capsys: Any) -> None:
    run, full = copied("matrix"), copied("killed-full")
    for command, file in (
        (["test", str(run)], run / "model/model.safetensors"),
        (["test", str(run)], run / "fingerprint.json"),
        (["merge", str(run)], run / "config.yaml"),
        (["report", str(run)], run / "report.json"),
        (["consolidate", str(full)], full / "masks.safetensors"),
        (["consolidate", str(full)], full / "config.yaml"),
        (["consolidate", str(full)], full / "checkpoints/step-000002.ckpt"),
    ):
        held = file.read_bytes()
        flip(0.5)(file, file)
        assert main(command) == 1
        assert str(file) in capsys.readouterr().err
        file.write_bytes(held)


def test_a_consolidated_model_is_recorded_and_verified(copied: Callable[[str], Path], capsys: Any) -> None:
    run = copied("killed-full")
    assert main(["consolidate", str(run)]) == 0
    assert main(["verify", str(run)]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    flip(0.9)(run / "model-step-000002/model.safetensors", run)
    assert main(["verify", str(run), "--json"]) == 1
    assert "model-step-000002/model.safetensors" in json.loads(capsys.readouterr().out)["faults"][0]


def test_compare_makes_a_damaged_cell_again(made: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "_run", in_this_process)
    without_pictures(monkeypatch)
    path = made / "comparison"  # no copy: its cells are named by where their masks are, too
    (recovered,), (pruned,) = path.glob("matrix-*"), path.glob("pruned-*")
    held = {name: one.clone() for name, one in load_file(recovered / "model/model.safetensors").items()}  # not mapped
    flip(0.7)(recovered / "model/model.safetensors", path)
    flip(0.7)(pruned / "masks.safetensors", path)
    assert main(["verify", str(path)]) == 1
    said = capsys.readouterr().out
    assert "2 wrong" in said
    assert str(recovered / "model/model.safetensors") in said
    assert main([*COMPARISON, "--directory", str(path)]) == 0
    made_again = load_file(recovered / "model/model.safetensors")
    assert all(torch.equal(held[name], made_again[name]) for name in held)
    assert main(["verify", str(path)]) == 0


def test_a_dense_model_of_another_run_is_not_taken(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:  # killed while it prunes: no claim to the directory
        patch.setattr("recon.experiment.selection.prune_to", killed)
        other = [arg.replace("hidden_size: 16", "hidden_size: 8") for arg in COMMANDS["offloaded"]]
        assert main([*other, "--run_dir", str(run)]) == 1
        assert json.loads((run / "dense/config.json").read_text())["hidden_size"] == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recon.experiment.recovery.train", killed)
        assert main([*COMMANDS["offloaded"], "--run_dir", str(run)]) == 1
    ours, theirs = (load_file(path / "dense/model.safetensors") for path in (run, made / "killed-offloaded"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_verify_finds_what_digests_do_not(copied: Callable[[str], Path], capsys: Any) -> None:
    run = RunPaths(copied("matrix"))
    masks = Masks.load(run.masks)
    turned = Masks({name: ~keep for name, keep in masks.items()})  # 2:4 as well
    turned.save(run.masks, Masks.read_metadata(run.masks), run.manifest.writing)
    report = json.loads(run.report.read_text())
    Report.from_dict(report | {"pattern": "4:8"}).save(run.report, run.manifest.writing)
    (run.windows / "stranger.safetensors").write_bytes(b"")
    assert main(["verify", str(run.path)]) == 1
    said = capsys.readouterr().out
    assert f"{run.model} has" in said
    assert "pruned weights that are not zero" in said
    assert "pattern 4:8, not 2:4" in said
    assert "stranger.safetensors is not recorded" in said
