"""A real SLURM on this machine for the tests: a controller and two node daemons, each of one core and a make-believe GPU.

Its configuration is seen at /etc/slurm by its own processes alone (a mount namespace), so that nothing of the machine's changes.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from kdfast.core.children import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "unshare", "nsenter")

CONFIGURATION = """\
ClusterName=toy
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={at}/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=3600
SlurmdTimeout=20
KillWait=5
SlurmctldPort={port}
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port1} CPUs=1 RealMemory=8000 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port2} CPUs=1 RealMemory=8000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def obstacle() -> str | None:
    """Why there can be no SLURM here."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} missing: make slurm installs it (Debian, Ubuntu)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        return "a SLURM of one's own needs root and mount namespaces"
    return None


def free_ports(*names: str) -> dict[str, int]:
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in sockets.items()}


class Slurm:
    """Started on entering, gone on leaving, with all its jobs."""

    def __init__(self, at: Path):
        self.at = at
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def begin(self) -> None:
        for name in ("etc", "state", "spool-n1", "spool-n2"):
            (self.at / name).mkdir(parents=True)
        text = CONFIGURATION.format(at=self.at, **free_ports("port", "port1", "port2"))
        (self.at / "etc" / "slurm.conf").write_text(text)
        (self.at / "etc" / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
        key = self.at / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.at.chmod(0o755)
        os.makedirs("/etc/slurm", exist_ok=True)
        # one process holds the namespace, in which all others are started
        hold = f"mount --bind {self.at}/etc /etc/slurm && echo ready && exec sleep infinity"
        words = ["unshare", "-m", "sh", "-c", hold]
        self.daemons.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent))
        assert self.daemons[0].stdout.readline() == "ready\n"
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.start("munged", "--foreground", "--force", *(f"--{option}={self.at}/munge.{end}" for option, end in files.items()))
        self.until(lambda: (self.at / "munge.sock").exists())
        self.start("slurmctld", "-D")
        self.start_node("n1")
        self.start_node("n2")
        self.until(lambda: self.run("sinfo", "-h", "-o", "%D %t").stdout == "2 idle\n")

    def __exit__(self, *_) -> None:
        if self.daemons:
            self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGKILL if daemon is self.daemons[0] else signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def within(self, *command: str, at: Path | str = ".") -> list[str]:
        """The words that run a command where this SLURM is seen, in the folder `at`."""
        return ["nsenter", "-t", str(self.daemons[0].pid), "-m", f"--wd={os.path.abspath(at)}", *command]

    def start(self, *command: str) -> subprocess.Popen:
        with open(self.at / f"{command[0]}.out", "a") as out:
            self.daemons.append(subprocess.Popen(self.within(*command), stdout=out, stderr=out, preexec_fn=die_with_parent))
        return self.daemons[-1]

    def start_node(self, name: str) -> subprocess.Popen:
        return self.start("slurmd", "-D", "-N", name)

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(self.within(*command), capture_output=True, text=True, **options)

    def jobs(self) -> list[dict[str, str]]:
        """Every job that has ended, as SLURM wrote it down."""
        file = self.at / "jobs.txt"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]

    def until(self, is_so, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-800:] for path in self.at.glob("*.log"))
                raise TimeoutError(f"SLURM did not come to that in {seconds} s:\n{logs}")
            time.sleep(0.2)
