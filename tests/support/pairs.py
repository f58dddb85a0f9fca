"""What each process of a pair runs: one command of recon, slowly, so that the two meet in the middle of a run."""

import io
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

from lightning.pytorch.callbacks import Callback

from recon.cli import main
from recon.scopes import Scope


class Pause(Callback):
    """Waits behind the first step, for the other process to come, and a little behind all others."""

    def __init__(self) -> None:
        self.seconds = 1.0

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)
        self.seconds = 0.1


def command(*args: str) -> tuple[int, int, str]:
    """Run recon with pauses; returns this process's id, the exit status and all that was said."""
    configured, said = Scope.configure_callbacks, io.StringIO()
    with (
        mock.patch.object(Scope, "configure_callbacks", lambda scope: [*configured(scope), Pause()]),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        status = main(list(args))
    return os.getpid(), status, said.getvalue()
