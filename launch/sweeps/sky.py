"""Runs of a sweep by SkyPilot: a managed job for each, which finds machines, and others when they are taken away.

A job is a file of YAML, which --dry_run prints. Machines get this clone, without what git ignores, install it with
launch/setup.sh, and read and write buckets as hosts of `sweeps.tpu` do. Exit code 75 of training is what a job recovers from,
as from the loss of its machines. SkyPilot joins no slices of TPUs: that is for `sweeps.tpu`.

SkyPilot reads much and objects to little. So what it takes without a word is decided here: the runtime version of TPUs (it gives
v5e that of v5p), the region (machines may leave that of the bucket), and the names of the fields of `job_recovery`.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import yaml

from mimic_video.config import ConfigError
from mimic_video.training.preemption import EXIT_CODE
from sweeps import hosts, tpu
from sweeps.points import Job, remaining

_PYTHON = ".venv/bin/python"
_PORT = 12355  # of the first node
# Without a strategy, a job that lost its machines goes to another region. What ends with a mistake ends soon.
_RECOVERY = {"strategy": "FAILOVER", "max_restarts_on_errors": 2, "recover_on_exit_codes": [EXIT_CODE]}


@dataclasses.dataclass(frozen=True)
class Options:
    """What machines are asked for.

    Attributes:
        infra: CLOUD/REGION, such as gcp/us-west4: the region of the bucket.
        accelerators: of a machine: GPUs and how many, such as H100:8, or a slice of TPUs, such as tpu-v5litepod-16.
        nodes: machines of a run.
        spot: whether they may be taken away at any time, and cost less.
    """

    infra: str
    accelerators: str
    nodes: int = 1
    spot: bool = True


def check(jobs: Sequence[Job], workdir: str, options: Options) -> None:
    """Raises ConfigError, naming the flag or the field, for what machines could not do."""
    if not re.fullmatch(r"gs://[^/]+/.+", workdir):
        raise ConfigError(f"--workdir is {workdir!r}; expected gs://BUCKET/FOLDER, which all machines reach")
    if not re.fullmatch(r"[\w-]+(/[\w-]+){1,2}", options.infra):
        raise ConfigError(f"--infra is {options.infra!r}; expected CLOUD/REGION with the bucket's region, such as gcp/us-west4")
    chips = _chips(options)
    for job in jobs:
        if _is_tpu(options):
            hosts.require_no_evaluation(job)
        try:
            hosts.check_experiment(job.config, chips, 1)
            hosts.config_file(job)
        except ConfigError as error:
            raise ConfigError(f"{options.nodes} x {options.accelerators}, {job.run}: {error}") from error


def dry_run(jobs: Sequence[Job], workdir: str, options: Options) -> str:
    """The YAML of every job, after the same checks."""
    check(jobs, workdir, options)
    return "---\n".join(_yaml(job, workdir, options) for job in jobs)


def submit(jobs: Sequence[Job], workdir: str, options: Options) -> int:
    """Hands over what has not finished and is not SkyPilot's already. Returns an exit code.

    Raises:
        ConfigError: for what machines could not do, or if SkyPilot is not there, or refuses.
    """
    check(jobs, workdir, options)
    known = _in_queue()
    left = [job for job in jobs if job.name not in known and remaining(job)]
    for job in left:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(_yaml(job, workdir, options))
            file.flush()
            print(f"{job.run} is job {job.name} of SkyPilot", flush=True)
            _require(subprocess.run(["sky", "jobs", "launch", "--yes", "--detach-run", file.name]))
    print(f"{len(left)} of {len(jobs)} runs were handed over; {sum(job.name in known for job in jobs)} had been before")
    return 0


def stop(jobs: Sequence[Job]) -> int:
    """Cancels what of the jobs SkyPilot has, with their machines. Returns an exit code.

    Raises:
        ConfigError: if SkyPilot is not there, or refuses.
    """
    known = _in_queue()
    names = [job.name for job in jobs if job.name in known]
    for name in names:
        _require(subprocess.run(["sky", "jobs", "cancel", "--yes", f"--name={name}"]))
    print(f"cancelled: {len(names)} of {len(jobs)} runs")
    return 0


def _is_tpu(options: Options) -> bool:
    return options.accelerators.startswith("tpu-")


def _slice(options: Options) -> tpu.Slice:
    kind = tpu.TYPES.get(options.accelerators.removeprefix("tpu-"))
    if kind is None:
        known = ", ".join(f"tpu-{name}" for name in tpu.TYPES)
        raise ConfigError(f"--accelerators is {options.accelerators!r}; expected GPUs, such as H100:8, or one of {known}")
    return kind


def _chips(options: Options) -> int:
    """Chips of a run. Raises ConfigError for accelerators that there are not."""
    if _is_tpu(options):
        if options.nodes > 1:
            raise ConfigError(
                f"--nodes is {options.nodes} with {options.accelerators}; expected 1, as SkyPilot does not join slices: "
                "--on=tpu --slices=N does"
            )
        return _slice(options).chips
    match = re.fullmatch(r"[A-Za-z][\w-]*(?::(\d+))?", options.accelerators)
    if match is None:
        raise ConfigError(f"--accelerators is {options.accelerators!r}; expected NAME:COUNT, such as H100:8")
    return int(match[1] or 1) * options.nodes


def _yaml(job: Job, workdir: str, options: Options) -> str:
    kind = {"accelerator_args": {"runtime_version": _slice(options).runtime}} if _is_tpu(options) else {}
    buckets = {
        f"{hosts.MOUNTS}/{bucket}": {"source": f"gs://{bucket}", "mode": "MOUNT"} for bucket in hosts.mounted_buckets(job.config)
    }
    task = {
        "name": job.name,
        "resources": {
            "infra": options.infra,
            "accelerators": options.accelerators,
            **kind,
            "use_spot": options.spot,
            "job_recovery": _RECOVERY,
        },
        "num_nodes": options.nodes,
        "workdir": str(hosts.ROOT),
        **({"file_mounts": buckets} if buckets else {}),
        "envs": {"JAX_COMPILATION_CACHE_DIR": f"{workdir.rstrip('/')}/compilation_cache", "PYTHONUNBUFFERED": "1"},
        "setup": f"launch/setup.sh {_extras(job, options)}\n",
        "run": _script(job, options),
    }
    return yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=10**6)


class _Dumper(yaml.SafeDumper):
    """Writes scripts as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if text.endswith("\n") else None)


_Dumper.add_representer(str, _text)


def _extras(job: Job, options: Options) -> str:
    """Extras of setup.py that machines need."""
    extras = hosts.extras(job.config)
    return extras if _is_tpu(options) else extras.replace("tpu", "cuda", 1) + ",sim" * bool(job.evaluations)


def _script(job: Job, options: Options) -> str:
    """What every machine runs, of TPUs every host: it trains, and the first one evaluates."""
    lines = []
    if options.nodes > 1:
        lines.append(f'export JAX_COORDINATOR_ADDRESS="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{_PORT}"')
        lines.append('export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"')
    lines.append(f"{_command('train.py', hosts.arguments(job))} || exit")
    if job.evaluations:
        lines.append('[ "$SKYPILOT_NODE_RANK" = 0 ] || exit 0')
    for arguments in job.evaluations.values():
        command = _command("evaluate.py", hosts.arguments(dataclasses.replace(job, training=arguments)))
        lines.append(f"JAX_NUM_PROCESSES=1 {command} || exit")
    return "\n".join(lines) + "\n"


def _command(script: str, arguments: Sequence[str]) -> str:
    return shlex.join([_PYTHON, f"launch/{script}", *arguments])


def _in_queue() -> set[str]:
    """Names of jobs that SkyPilot has, and that have not ended. Raises ConfigError if it is not there."""
    if shutil.which("sky") is None:
        raise ConfigError("--on=sky, but there is no sky; expected SkyPilot, as after pip install 'skypilot[gcp]'")
    done = subprocess.run(["sky", "jobs", "queue", "--skip-finished", "--all", "--output=json"], capture_output=True, text=True)
    if done.returncode and "No in-progress managed jobs" in done.stderr:  # what it says before its first job
        return set()
    _require(done)
    start = re.search(r"^\[(?=\]|$)", done.stdout, re.MULTILINE)  # it may say before that it starts a server
    assert start is not None
    return {each["job_name"] for each in json.loads(done.stdout[start.start() :])}


def _require(done: subprocess.CompletedProcess) -> None:
    """Raises ConfigError if a command of SkyPilot failed; what it says is on the screen, or its last line in the message."""
    if done.returncode:
        last = (done.stderr or "").strip().rpartition("\n")[2]
        raise ConfigError(f"{shlex.join(done.args[:3])} ended with exit code {done.returncode}" + f": {last}" * bool(last))
