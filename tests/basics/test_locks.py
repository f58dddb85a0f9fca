"""Locks: who owns a run directory, who shares it, and what remains of a process that was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recon.basics.files import atomic_write, partial, put_in_place, settle, sweep
from recon.basics.locks import locked, owned

HOLD = """
import sys, time
from pathlib import Path
from recon.basics.locks import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


def test_the_second_owner_is_told_who_the_first_is_and_a_dead_owner_is_none(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "owned\n"
        said = rf"process {first.pid} on host {socket.gethostname()}, .*wait until it ends, stop it, or name another"
        with pytest.raises(ValueError, match=said), owned(run):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (run / ".owner.json").exists()
    with owned(run):
        assert json.loads((run / ".owner.json").read_text())["process"] == os.getpid()
    assert not (run / ".owner.json").exists()


def test_parts_share_a_directory_with_each_other_alone(tmp_path: Path) -> None:
    one, two = (tmp_path / "parts" / name for name in ("001-of-002", "002-of-002"))
    with owned(tmp_path, one), owned(tmp_path, two):
        with pytest.raises(ValueError, match="001-of-002"), owned(tmp_path, one):
            pass
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), owned(tmp_path):
            pass
    with owned(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()}"), owned(tmp_path, two):
        pass
    with owned(tmp_path, two):
        pass


def test_a_lock_that_is_not_waited_for_says_whether_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locked(path) as first, locked(path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(path, wait=False) as third:
        assert third


def test_a_directory_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for content in ("old", "new"):
        partial(model).mkdir()
        (partial(model) / "x").write_text(content)
        put_in_place(model)
        assert [(path.name, (path / "x").read_text()) for path in tmp_path.iterdir()] == [("model", content)]


@pytest.mark.parametrize("is_renamed_in", [False, True])
def test_a_kill_between_the_two_renames_leaves_the_old_or_the_new_one(is_renamed_in: bool, tmp_path: Path) -> None:
    model, aside = tmp_path / "model", tmp_path / ".model.old"
    aside.mkdir()
    (aside / "x").write_text("old")
    if is_renamed_in:
        model.mkdir()
        (model / "x").write_text("new")
    settle(model)
    assert (model / "x").read_text() == ("new" if is_renamed_in else "old")
    assert not aside.exists()


def test_temporary_files_of_killed_writes_are_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".x.tmp", "y.tmp", ".masks.lock", "x.safetensors")]
    for path in kept:
        path.touch()
    writing = atomic_write(tmp_path / "x.safetensors")
    writing.__enter__().write_text("half")  # and is killed here
    assert len(list(tmp_path.iterdir())) == 5
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
