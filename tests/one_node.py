"""A real Slurm of one node in a folder, from Debian's packages slurm-wlm and munge."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

# cred_expire: a job that was requeued waits so long before it starts again (default: 2 minutes).
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=5
OverTimeLimit=0
MinJobAge=600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes={host} DefaultTime=30 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """The first program that is not installed, or the reason why there can be no daemons."""
    os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    return next((name for name in PROGRAMS if shutil.which(name) is None), "")


class OneNode:
    """The daemons, started by `start` and ended by `stop`; other folders, other clusters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munged refuses a folder that others could write to
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=pwd.getpwuid(os.geteuid()).pw_name,
            folder=folder,
            ports=[_free_port(), _free_port()],
        )
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.env: Mapping[str, str] = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        places = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files = {**places, "log-file": "log/munged", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self.start_daemon("munged", "--foreground", "--force", *options)
        wait_for((self.folder / "munge.socket").exists)
        self.start_daemon("slurmctld", "-D")
        self.start_daemon("slurmd", "-D")
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T", "-p", "low") == "idle\n")

    def start_daemon(self, name: str, *options: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [name, *options], stdout=out, stderr=out, env=self.env, start_new_session=True
            )

    def stop_daemon(self, name: str, signum: int = signal.SIGTERM) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signum)
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in list(self._daemons)[::-1]:
            self.stop_daemon(name)

    def cancel_all(self) -> None:
        if jobs := self.queue():
            self.run("scancel", *jobs)
            wait_for(lambda: not self.queue())

    def run(self, *command: str) -> str:
        """The output of a command of Slurm."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, check=False)
        return done.stdout

    def queue(self) -> dict[str, str]:
        """The states of the jobs that have not ended, elements of arrays one by one."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)


def wait_for(holds: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
