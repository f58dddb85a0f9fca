"""Options of the trainer that the command refuses before it loads anything."""

import re
from pathlib import Path

import pytest

from recon.cli import main


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("--trainer.max_epochs=3", "does not take trainer.max_epochs, got 3: .* set model.epochs"),
        ("--trainer.fast_dev_run=true", "does not take trainer.fast_dev_run, got True"),
        ("--trainer.barebones=true", "barebones"),
        ("--trainer.default_root_dir={tmp}", "a run is written to --run_dir, got trainer.default_root_dir {tmp}"),
        ("--ckpt_path=x.ckpt", "ckpt_path"),
        ("--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", "enable_checkpointing=False"),
    ],
)
def test_the_command_refuses_before_it_loads(
    option: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, option, match = tmp_path / "run", option.format(tmp=tmp_path), match.format(tmp=re.escape(str(tmp_path)))
    assert main(["fit", "-c", "scopes/submodule", "--run_dir", str(run_dir), "--summary=false", option]) == 2
    said = capsys.readouterr()
    assert "load" not in said.out
    assert said.err.startswith("recon fit: error: ")
    assert re.search(match, said.err), said.err
