"""A real SLURM on this machine, for a test: munged, slurmctld and slurmd with all their files in one directory.

One node with two CPUs and two pretended GPUs. Needs root, and Debian's slurm-wlm and munge.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.support.processes import free_port

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}:/usr/sbin"

CONFIGURATION = """
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=2
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmdSpoolDir={directory}/spool
StateSaveLocation={directory}/state
SlurmctldPort={controller}
SlurmdPort={node}
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
KillWait=10
JobRequeue=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """What a real SLURM needs and this machine lacks."""
    lacking = [name for name in (*DAEMONS, "sbatch", "setpriv") if shutil.which(name, path=SBIN) is None]
    if lacking:
        return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "needs root, to start munged, slurmctld and slurmd"
    return None if find_spec("submitit") else "needs submitit: the extra `slurm`"


class SlurmCluster:
    """The commands of a cluster that runs.

    Args:
        directory: Of its files.
    """

    def __init__(self, directory: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = inherited | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{SBIN}",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """What a command prints.

        Raises:
            AssertionError: If it fails.
        """
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *args: str, cwd: Path) -> str:
        """Submit a job by sbatch; its number."""
        return self.call("sbatch", "--parsable", *args, cwd=cwd).strip()

    def queue(self, *options: str) -> list[str]:
        """Job and state of all jobs in the queue."""
        return self.call("squeue", "--noheader", "--array", "--format=%i %T", *options).splitlines()

    def wait_for(self, is_so: Callable[[], object], what: str, seconds: float = 180.0) -> None:
        """Wait until something is so.

        Raises:
            AssertionError: If it is not after `seconds`.
        """
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"{what} did not happen in {seconds} s; the queue: {self.queue()}"
            time.sleep(0.3)

    def wait_for_end(self, seconds: float = 240.0) -> None:
        """Wait until no job is left."""
        self.wait_for(lambda: not self.queue(), "the end of all jobs", seconds)


@contextmanager
def slurm_cluster(directory: Path) -> Iterator[SlurmCluster]:
    """Start a cluster; its jobs and daemons are gone at the end of the context, and if this process is killed.

    Args:
        directory: Of its files; a short path, since it holds a socket.
    """
    cluster, started = SlurmCluster(directory), []
    _write(directory)
    try:
        for name, *options in (
            ("munged", "--foreground", "--force", *(f"--{file}={directory}/{path}" for file, path in MUNGE.items())),
            ("slurmctld", "-D", "-c", "-f", str(directory / "slurm.conf")),
            ("slurmd", "-D", "-f", str(directory / "slurm.conf")),
        ):
            with (directory / f"{name}.log").open("w") as log:
                command = ["setpriv", "--pdeathsig", "TERM", name, *options]
                daemon = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
            started.append(daemon)
            if name == "munged":
                cluster.wait_for((directory / "munge.socket").exists, "the start of munged", 20)
        cluster.wait_for(lambda: _is_idle(cluster), "the start of the node", 60)
        yield cluster
    finally:
        subprocess.run(["scancel", "--user=root"], env=cluster.environment, capture_output=True)
        try:
            if started and all(daemon.poll() is None for daemon in started):
                cluster.wait_for_end(60)
        finally:
            for daemon in reversed(started):
                daemon.terminate()
            for daemon in started:
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


MUNGE = {
    "key-file": "munge.key",
    "socket": "munge.socket",
    "pid-file": "munge.pid",
    "log-file": "munge.out",
    "seed-file": "munge.seed",
}
"""Options of munged and their files."""


def _write(directory: Path) -> None:
    """Write the configuration and the key."""
    host = socket.gethostname().partition(".")[0]
    for name in ("spool", "state"):
        (directory / name).mkdir()
    (directory / "munge.key").write_bytes(secrets.token_bytes(1024))
    (directory / "munge.key").chmod(0o400)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 9 // 10
    text = CONFIGURATION.format(host=host, directory=directory, controller=free_port(), node=free_port(), memory=memory)
    (directory / "slurm.conf").write_text(text)
    devices = "".join(f"NodeName={host} Name=gpu File=/dev/{name}\n" for name in ("null", "zero"))
    (directory / "gres.conf").write_text(devices)


def _is_idle(cluster: SlurmCluster) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.environment, capture_output=True, text=True
    )
    return done.stdout.split() == ["idle"]
