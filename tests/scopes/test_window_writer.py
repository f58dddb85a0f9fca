"""Finished windows are written from a thread where the weights are on a device, and errors of it surface."""

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from recon.models.anatomy import Anatomy
from recon.models.windows import Window, block_windows
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.local.window_writer import WindowWriter
from tests.support.families import tiny
from tests.support.simulated.device import simulated_cuda

RESULT = {"before": 2.0, "after": 1.0, "tokens": 3, "seconds": 0.5}


def model_and_windows() -> tuple[nn.Module, list[Window]]:
    model = tiny("llama")
    return model, list(block_windows(Anatomy.of(model), 1))


def test_a_window_is_written_as_it_was_while_its_weights_change(tmp_path: Path) -> None:
    (model, (window, *_)), files = model_and_windows(), WindowFiles(tmp_path)
    threads, may_write, write = [], threading.Event(), WindowFiles.write

    def slow(files: WindowFiles, *args: Any) -> None:
        threads.append(threading.current_thread())
        may_write.wait()
        write(files, *args)

    with simulated_cuda(), mock.patch.object(WindowFiles, "write", slow):
        nn.Module.to(model, "cuda")
        writer, expected = (
            WindowWriter(files),
            {name: model.get_parameter(name).detach().cpu() for name in window.owned},
        )
        assert writer.keep(window, model, RESULT) == RESULT
        with torch.no_grad():
            for name in window.owned:
                model.get_parameter(name).zero_()
        assert window not in files
        may_write.set()
        writer.wait()
    assert threads != [threading.main_thread()]
    assert files.load(window, other := tiny("llama")) == RESULT
    assert all(torch.equal(other.get_parameter(name), weight) for name, weight in expected.items())


def test_an_error_of_the_thread_ends_the_run_at_the_next_window_or_at_its_end(tmp_path: Path) -> None:
    model, (first, second, _) = model_and_windows()
    (tmp_path / "windows").write_text("in the way")
    with simulated_cuda():
        nn.Module.to(model, "cuda")
        writer = WindowWriter(WindowFiles(tmp_path / "windows"))
        writer.keep(first, model, RESULT)
        with pytest.raises(OSError, match="could not write"):
            writer.keep(second, model, RESULT)
        writer.wait()  # it is told once
        writer.files.directory.unlink()  # type: ignore[union-attr]
        writer.keep(second, model, RESULT)
        writer.wait()
    assert second in writer.files


def test_weights_on_the_host_are_written_at_once(tmp_path: Path) -> None:
    model, (window, *_) = model_and_windows()
    writer = WindowWriter(WindowFiles(tmp_path))
    writer.keep(window, model, RESULT)
    assert window in writer.files
