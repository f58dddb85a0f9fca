"""Child processes that are forks of one that has imported recon: each cell is spared the seconds of that (Linux)."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from recon.basics.children import PARENT, Children, Process

SERVER = "recon.cli.forking"


class Forks(Children):
    """As `Children`, but commands of recon run in forks; at most one at a time of each process that forks."""

    def __init__(self) -> None:
        super().__init__()
        self._idle: list[Server] = []
        self._idle_lock = threading.Lock()

    def _start(self, command: Sequence[str], environment: Mapping[str, str], is_recon: bool) -> Process:
        recon = [sys.executable, "-m", "recon"]
        if not is_recon or list(command[:3]) != recon:
            return super()._start(command, environment, is_recon)
        with self._idle_lock:
            fitting = [server for server in self._idle if server.environment == environment]
            server = fitting[0] if fitting else Server(environment)
            self._idle = [one for one in self._idle if one is not server]
        return Fork(server, command[3:], self._take_back)

    def _take_back(self, server: "Server") -> None:
        with self._idle_lock:
            if self._is_stopped:
                server.close()
            else:
                self._idle.append(server)

    def stop(self) -> None:
        """See `Children`; the processes that fork end, too."""
        super().stop()
        with self._idle_lock:
            for server in self._idle:
                server.close()
            self._idle.clear()


class Server:
    """The process that forks.

    Args:
        environment: Its variables, which are those of all its forks.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        # A packet is a message; the other end of a stream would have to tell where one ends.
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER, str(theirs.fileno())],
                env={**environment, PARENT: str(os.getpid())},
                pass_fds=[theirs.fileno()],
            )

    def status(self) -> int | None:
        """Wait for the end of its fork: the exit status; None if it has ended itself."""
        with suppress(ConnectionError):
            if message := self.socket.recv(32):
                return int(message)
        self.close()
        return None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal: SIGTERM goes on to its fork, SIGKILL ends both."""
        self._process.send_signal(number)

    def close(self) -> None:
        """End it, and a fork that it still has."""
        self._process.kill()
        self._process.wait()
        self.socket.close()


class Fork:
    """A command of recon in a fork, which may still have to wait for its server's imports.

    Args:
        server: Forks.
        args: Of recon.
        give_back: Takes the server when the command has ended.
    """

    def __init__(self, server: Server, args: Sequence[str], give_back: Callable[[Server], None]) -> None:
        self._server, self._give_back = server, give_back
        self.returncode: int | None = None
        reading, writing = os.pipe()
        self.stdout: IO[str] | None = os.fdopen(reading)
        with suppress(ConnectionError):  # then there is no status either
            socket.send_fds(server.socket, [json.dumps(list(args)).encode()], [writing])
        os.close(writing)

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.stdout is not None:
            self.stdout.close()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, whatever `timeout` is; the exit status, negative for a signal, 1 if its server ended."""
        if self.returncode is None:
            status = self._server.status()
            self.returncode = 1 if status is None else status
            if status is not None:
                self._give_back(self._server)
        return self.returncode

    def kill(self) -> None:
        """End it at once, and its server."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Have it end as it does at SIGTERM."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            self._server.send(number)
