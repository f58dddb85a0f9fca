"""Cards of real runs: written after the report, again after a kill, never in the way; and their upload."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from recon.basics.digests import sha256_of
from recon.basics.run_paths import RunPaths
from recon.cli import main
from recon.experiment.carding import kind_of, kinds_of, write_card
from recon.experiment.directory import RunDirectory
from recon.experiment.verification import verify
from recon.pruning.masks import Masks
from recon.report import Report

SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, tie_word_embeddings: true}"
)
COMMON = ["--model.name=random", f"--model.shape={SHAPE}", "--pattern=2:4", "--summary=false", "--drift=false"]
COMMON += ["--data.num_sequences=4", "--data.seq_len=32", "--data.num_validation=2", "--data.num_test=2"]
LIGHT = ["--trainer.logger=false", "--trainer.callbacks=null"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recovery whose card could not be written, and a pruning with its model; their text is read once."""
    root = tmp_path_factory.mktemp("push")
    words = [f"word{number % 7} is {number}. " for number in range(400)]
    documents = ["".join(words[first : first + 40]) for first in range(0, 400, 8)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recon.experiment.recovery.write_card", lambda *_: None)  # as if it was killed before
        assert main([*fit(root), "--run_dir", str(root / "run")]) == 0
    assert main(["prune", *COMMON, *data(root), "--save_model", "--run_dir", str(root / "pruned")]) == 0
    return root


def data(root: Path) -> list[str]:
    return ["--data.source=TextFiles", f"--data.source.paths=[{root / 'text.jsonl'}]"]


def fit(root: Path) -> list[str]:
    return ["fit", "-c", "scopes/matrix", *COMMON, *data(root), *LIGHT]


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunPaths:
    """A finished run without its card."""
    return RunPaths(Path(copytree(made / "run", tmp_path / "run")))


class StandIn:
    """In place of HfApi: keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def __call__(self) -> "StandIn":
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.asked.append(("create", {"repo_id": repo_id, **options}))
        return f"https://hub/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr("recon.cli.push.HfApi", stand_in)
    return stand_in


def test_a_run_killed_before_its_card_is_finished_and_gets_it_at_the_next_start(
    made: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run.card.exists()
    assert RunDirectory(run.path, None).is_finished
    assert verify(run.path).faults == []
    held = sha256_of(run.model / "model.safetensors")
    assert main([*fit(made), "--run_dir", str(run.path)]) == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    assert run.manifest.fault(run.card) is None
    found = verify(run.path)
    assert (found.faults, found.notes) == ([], [])
    report, card = Report.load(run.report), ModelCard.load(run.card)
    assert [one.metric_value for one in card.data.eval_results or []] == [
        *(report.perplexity, report.pruned_perplexity, report.dense_perplexity)
    ]
    assert f"| `model.safetensors` | `{held}` |" in card.text
    assert sha256_of(run.model / "model.safetensors") == held


def test_sizes_and_zeros_are_those_of_the_files(made: Path) -> None:
    run = RunPaths(made / "pruned")
    text = ModelCard.load(run.card).text
    assert main(["verify", str(run.path)]) == 0
    weights = load_file(run.model / "model.safetensors")
    masks = Masks.load(run.masks)
    total = {kind: sum(keep.numel() for name, keep in masks.items() if kind in name) for kind in ("q_proj", "up_proj")}
    assert f"| `self_attn.q_proj` | {total['q_proj']:,} | 50.00% |" in text
    assert f"| `mlp.up_proj` | {total['up_proj']:,} | 50.00% |" in text
    assert sum(pruned for pruned, _ in kinds_of(masks).values()) == masks.num_pruned
    report = Report.load(run.report)
    saved = sum(path.stat().st_size for path in run.model.iterdir() if path != run.card)
    assert report.disk_bytes == saved
    zeros = sum(int((weights[name] == 0).sum()) for name in masks)
    packed = saved - 4 * zeros + sum(keep.numel() for keep in masks.values()) // 8
    assert f"prunable weight) | {packed / 2**10:,.0f} KiB |" in text


def test_the_recipe_makes_the_same_weights(made: Path, run: RunPaths, tmp_path: Path) -> None:
    write_card(run)
    for source, command in ((run, "fit"), (RunPaths(made / "pruned"), "prune")):
        text = ModelCard.load(source.card).text
        (tmp_path / "recipe.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
        (line,) = [line.strip() for line in text.splitlines() if line.startswith("    recon ")]
        again = tmp_path / command
        words = line.replace("recipe.yaml", str(tmp_path / "recipe.yaml")).split()[1:]
        quick = ["--drift=false", "--baselines=false", "--summary=false", *(LIGHT if command == "fit" else [])]
        assert main([*words, *quick, "--run_dir", str(again)]) == 0
        ours, theirs = (load_file(path / "model/model.safetensors") for path in (again, source.path))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_card_that_cannot_be_written_is_one_warning(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("recon.experiment.carding.card", lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING, "recon"):
        write_card(run)
    assert [record.message.startswith(f"could not write {run.card} (division") for record in caplog.records] == [True]
    assert not run.card.exists()
    assert RunDirectory(run.path, None).is_finished


def test_an_edited_card_stays_and_a_killed_write_is_no_damage(
    made: Path, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)  # dies between the record and the name
        write_card(run)
    write_card(run)
    run.card.write_text(run.card.read_text() + "\nMine.\n")
    (run.model / f".README.md.{'0' * 32}.tmp").touch()
    assert RunDirectory(run.path, None).is_finished
    found = verify(run.path)
    assert (found.faults, found.notes) == ([], [f"{run.card} was edited"])
    assert main([*fit(made), "--run_dir", str(run.path)]) == 0
    assert run.card.read_text().endswith("Mine.\n")
    assert not list(run.model.glob(".*"))
    run.card.unlink()
    assert verify(run.path).notes == [f"{run.card} is gone; the next start writes it"]


def test_no_card_where_there_is_no_model(run: RunPaths) -> None:
    run.manifest.forget(run.model)
    write_card(run)
    assert not run.card.exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_proj.weight", "mlp.c_proj"),
        ("model.layers.3.moe.experts.7.w1.weight", "moe.experts.*.w1"),
        ("head.weight", "head"),
    ],
)
def test_a_kind_is_the_name_behind_the_block(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_push_is_a_dry_run_until_told(run: RunPaths, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    (run.model / ".stray").touch()
    (run.model / "notes.txt.bak").touch()
    run_files = {path.name for path in run.model.iterdir()} - {".stray", "notes.txt.bak"}
    assert main(["push", str(run.path), "org/name"]) == 1
    assert "notes.txt.bak is not recorded" in capsys.readouterr().err
    (run.model / "notes.txt.bak").unlink()
    assert main(["push", str(run.path), "org/name"]) == 0
    said = capsys.readouterr().out
    assert "dry run: nothing was sent" in said
    assert "model-index:" in said
    assert all(name in said for name in run_files)
    assert hub.asked == []
    assert main(["push", str(run.path), "org/name", "--yes", "--private"]) == 0
    assert "uploaded to https://hub/org/name" in capsys.readouterr().out
    (create, made), (upload, sent) = hub.asked
    assert (create, upload) == ("create", "upload")
    assert made == {"repo_id": "org/name", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("org/name", run.model)
    assert set(sent["allow_patterns"]) == run_files | {"README.md"}


def spoil(run: RunPaths) -> None:
    file = run.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def unfinish(run: RunPaths) -> None:
    run.manifest.forget(run.report)
    run.report.unlink()


def garble(run: RunPaths) -> None:
    run.card.write_text("---\n: [\n---\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [(spoil, "model.safetensors has not the sha256"), (unfinish, "a finished run"), (garble, "metadata as YAML")],
)
def test_push_refuses_a_run_that_is_not_whole(
    harm: Callable[[RunPaths], None], message: str, run: RunPaths, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    assert main(["push", str(run.path), "org/name", "--yes"]) == 1
    assert message in capsys.readouterr().err
    assert hub.asked == []


def test_push_tells_what_the_hub_or_the_line_is_wrong_about(
    run: RunPaths, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("name", "a/b/c", "a/..b"):
        assert main(["push", str(run.path), name]) == 2
    hub.error = ConnectionResetError("no route")
    assert main(["push", str(run.path), "org/name", "--yes"]) == 1
    hub.error = RuntimeError("no route")
    assert main(["push", str(run.path), "org/name", "--yes"]) == 1
    said = capsys.readouterr().err
    assert said.count("no route") == 2
    assert "cannot be reached" in said
    assert issubclass(HfHubHTTPError, OSError)  # what the hub itself refuses with
