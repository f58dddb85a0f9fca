"""A process that has imported what cells of a comparison need, and runs each of them in a fork of its own.

Started by `recon.experiment.comparison.forks`, with the number of its socket. A message is the arguments of `recon`,
with the file that output goes to; the answer is its exit status.
"""

import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
from contextlib import suppress

from recon.basics.children import PARENT, die_with_parent
from recon.cli import main as recon

COMMANDS = ("fit", "prune", "test")
"""What cells run."""

LONGEST = 2**20
"""Bytes of a message."""


def main() -> int:
    """Fork for each message until the other side is closed; in a fork, the status of its command."""
    fork = 0

    def pass_on(number: int, _: object) -> None:
        if fork == 0:
            sys.exit(1)
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(fork, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command that started this one
    die_with_parent()
    for command in COMMANDS:
        importlib.import_module(f"recon.cli.{command}")
    gc.freeze()  # forks share what there is until now
    signal.signal(signal.SIGTERM, pass_on)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        while True:
            message, files, _, _ = socket.recv_fds(connection, LONGEST, 1)
            if not message:
                return 0
            parent, fork = os.getpid(), os.fork()
            if fork == 0:
                connection.close()
                return _run(json.loads(message), files[0], parent)
            os.close(files[0])
            _, status = os.waitpid(fork, 0)
            fork = 0
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(args: list[str], output: int, parent: int) -> int:
    """Run a command in this process as if it had been started for that."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.close(output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ[PARENT] = str(parent)
    sys.argv = ["recon", *args]
    # Lightning starts further processes of a run by the name of this module.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("recon.__main__")
    return recon()


if __name__ == "__main__":
    sys.exit(main())
