"""A real SLURM of a few nodes on this one machine, over loopback, for as long as a test session.

    python tests/slurm_cluster.py FOLDER     # starts one and waits for SIGTERM or Ctrl-C

Needs Debian's slurmctld, slurmd, slurm-client and munge, which it installs where it may. Every
daemon is a child of this process, and what it writes is below one folder, apart from a line in
``/etc/hosts`` that gives the nodes names; both are gone when the cluster stops.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "srun")
HOSTS = Path("/etc/hosts")
MARK = f"# uar-megatron tests {os.getpid()}"

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The default of 120 s is how long every requeue would take.
AuthInfo=socket={folder}/munge/socket,cred_expire=15
# The port of a job's ranks comes from its number, and sessions may share a machine.
FirstJobId={first}
MessageTimeout=60
BatchStartTimeout=120
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=requeue_delay=1,batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=120
MinJobAge=3600
SlurmctldTimeout=300
SlurmdTimeout=300
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 \\
  Port=[{first}-{last}] CPUs=3 RealMemory=8000
PartitionName=all Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class NoSlurmError(Exception):
    """There is no SLURM here and none can be had; says why."""


def install() -> None:
    """Install what is missing.

    Raises:
        NoSlurmError: this user may not, or there are no packages.
    """
    if os.geteuid() != 0:
        raise NoSlurmError("a SLURM cluster of several nodes on one machine needs root")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoSlurmError(f"{', '.join(missing)} are missing, and there is no apt-get")
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", *command],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode and command[0] == "install":
            raise NoSlurmError(f"apt-get install {' '.join(PACKAGES)}: {done.stdout[-500:]}")


class SlurmCluster:
    """A running cluster.

    Args:
        folder: of its configuration, logs and state.
        nodes: how many; each believes that it has 3 cores, so that three jobs run at a time.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need in order to find the cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons; returns when every node is idle."""
        for name in ("munge", "state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        first = 10001 + os.getpid() % 9000  # several sessions may share a machine
        text = CONFIGURATION.format(
            folder=self.folder,
            host=socket.gethostname(),
            port=first - 1,
            nodes=len(self.nodes),
            first=first,
            last=first + len(self.nodes) - 1,
        )
        (self.folder / "slurm.conf").write_text(text)
        self._name_nodes()
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        socket_file = f"--socket={munge / 'socket'}"
        self._start("munged", "--foreground", "--force", socket_file, *files)
        _wait_until(lambda: (munge / "socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        _wait_until(self._is_idle, f"the nodes; see {self.folder}/slurm*.log")

    def stop(self) -> None:
        """End all jobs and daemons."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root", "--signal=KILL")
            self.run("scancel", "--user=root")
            _wait_until(lambda: not self.run("squeue", "-h"), "the last jobs", seconds=15)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if MARK not in line))

    def run(self, *command: str, **options: object) -> str:
        """Run one of SLURM's commands and return what it prints.

        Raises:
            RuntimeError: it failed; with its message.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, **options
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def _is_idle(self) -> bool:
        with contextlib.suppress(RuntimeError):
            states = self.run("sinfo", "-h", "-N", "-o", "%t").split()
            return len(states) == len(self.nodes) and set(states) == {"idle"}
        return False

    def _name_nodes(self) -> None:
        # Whatever there is already: another session's line goes when that session ends.
        with HOSTS.open("a") as hosts:
            hosts.write(f"127.0.0.1 {' '.join(self.nodes)} {MARK}\n")


@contextlib.contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[SlurmCluster]:
    """A cluster for the length of a ``with`` block.

    Raises:
        NoSlurmError: there is none to be had.
    """
    install()
    running = SlurmCluster(folder, nodes)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _wait_until(condition: object, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise NoSlurmError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, end)
    with contextlib.suppress(KeyboardInterrupt), cluster(Path(sys.argv[1]).resolve(), 3) as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        signal.pause()
