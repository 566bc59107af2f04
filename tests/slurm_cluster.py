"""A Slurm of one node on this machine, for as long as a test takes. Debian has it in the package slurm-wlm."""

import contextlib
import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

_PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "sinfo")
_PATH = os.pathsep.join(
    (os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")
)  # where daemons are, of which users see little
_SECONDS = 60  # that it may take to start or to end

# No accounts, no control groups and no munge: everything is this user's. A job that was put back waits until credentials have
# expired: not two minutes here.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=30
SchedulerParameters=sched_interval=5
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
SlurmdParameters=config_overrides
KillWait=60
NodeName=localhost NodeHostname={node} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(cpus: int = 4) -> Iterator[dict[str, str]]:
    """The environment in which `srun`, `sbatch` and `scancel` are those of a cluster of one node, which ends with the context.

    A test that enters it is skipped where Slurm is not installed.

    Args:
        cpus: of the node, as Slurm shares them out; the machine may have fewer.
    """
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)}; expected Slurm, as after apt-get install slurm-wlm")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, contextlib.ExitStack() as stack:
        node = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            pathlib.Path(folder, name).mkdir()
        configuration = pathlib.Path(folder, "slurm.conf")
        user = getpass.getuser()
        # A run's port follows from its job's number: clusters of several workers of pytest are on one machine.
        first_job = 1 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        configuration.write_text(
            _CONFIGURATION.format(node=node, user=user, ports=_free_ports(2), folder=folder, cpus=cpus, first_job=first_job)
        )
        # What an outer job of Slurm says is not for this one.
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "SBATCH_"))}
        environment = outer | {"PATH": _PATH, "SLURM_CONF": str(configuration)}
        logs = [pathlib.Path(folder, f"{daemon}.log") for daemon in ("slurmctld", "slurmd")]
        for log, options in zip(logs, ([], ["-N", "localhost"]), strict=True):
            stack.enter_context(_daemon([log.stem, "-D", *options], environment, log))
        deadline = time.monotonic() + _SECONDS
        while (state := _printed(["sinfo", "--noheader", "--format=%T"], environment)) != "idle":
            if time.monotonic() > deadline:
                pytest.fail(f"Slurm's node is {state!r}, not idle\n" + "\n".join(log.read_text() for log in logs))
            time.sleep(0.1)
        try:
            yield environment
        finally:
            for how in ("--signal=KILL", "--quiet"):  # tasks, and what waits or runs them
                subprocess.run(["scancel", f"--user={user}", how], env=environment, check=False, capture_output=True)
            deadline = time.monotonic() + _SECONDS
            while _printed(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
                time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _daemon(command: list[str], environment: dict[str, str], log: pathlib.Path) -> Iterator[None]:
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _printed(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True).stdout.strip()
