"""Runs of a sweep with Slurm: one job array, a task of it for each run.

It trains with as many processes as the job has tasks, which `srun` starts, and then evaluates with one. Training that was told to
stop, as it is before the time limit, ends with exit code 75, and goes back into the queue.

This clone and its Python are on a file system that all nodes share, and WORKDIR is there, too, or in a bucket. The script is
handed to `sbatch` and is no file; --dry_run shows it. What a run prints is in RUN/log.txt, what Slurm says in WORKDIR/slurm.txt,
and WORKDIR/slurm.json lists the runs of each array that was submitted. Of gs://BUCKET/FOLDER, the texts are in
runs/BUCKET/FOLDER of the folder where the command is given.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from etils import epath

from mimic_video.config import ConfigError
from mimic_video.runs.directory import write_json
from mimic_video.runs.storage import RunError, in_bucket, read_whole, run_path
from mimic_video.training.preemption import EXIT_CODE
from sweeps.points import Job, cloud_name, remaining

_LAUNCH = pathlib.Path(__file__).resolve().parent.parent
_COMMANDS = ("sbatch", "squeue", "scancel")
_READ_BY_SBATCH = ("SLURM_CONF", "SLURM_CLUSTERS")  # the rest of SLURM_* describes the job that this shell is in

# What the user asks for stands last, and wins.
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{at_once}
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
{lines}
logs=(
{logs}
)
log=${{logs[SLURM_ARRAY_TASK_ID]}}
mkdir -p "$(dirname "$log")" && exec >>"$log" 2>&1 || exit 1
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID of one of the tasks is that of the whole array
echo "$(date '+%F %T') job $task on $SLURM_JOB_NODELIST, started again ${{SLURM_RESTART_COUNT:-0}} times"
export PYTHONUNBUFFERED=1
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not read the former
each() {{ srun --kill-on-bad-exit=0 "$@"; }}  # a process for each task; when one fails, the others say why
one() {{ JAX_NUM_PROCESSES=1 "$@"; }}  # a process on the first node

case $SLURM_ARRAY_TASK_ID in
{cases}
esac
code=$?
if [ $code = {stopped} ]; then  # it was told to stop, and has saved
  scontrol requeue incomplete "$task" && sleep 60  # meanwhile Slurm ends this shell
fi
exit $code
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """How jobs are submitted.

    Attributes:
        lines: options of sbatch, as they stand behind #SBATCH: "--partition=gpu", "--comment='two words'".
        jobs: runs at once; 0 for all.
    """

    lines: tuple[str, ...] = ()
    jobs: int = 0


def dry_run(jobs: Sequence[Job], workdir: str, options: Options) -> str:
    """The script of an array that does what remains of each job.

    Raises:
        ConfigError: for a line that is no option, or takes the place of one that the sweep needs.
    """
    return _SCRIPT.format(
        name=cloud_name(workdir, workdir),
        last=len(jobs) - 1,
        at_once=f"%{options.jobs}" if options.jobs else "",
        output=shlex.quote(f"{_printed(workdir)}/slurm.txt".replace("%", "%%")),
        lines="".join(f"#SBATCH {_checked(line)}\n" for line in options.lines),
        logs="\n".join(f"  {shlex.quote(f'{_printed(job.run)}/log.txt')}" for job in jobs),
        cases="\n".join(f"{index})\n{_commands(job)}\n  ;;" for index, job in enumerate(jobs)),
        stopped=EXIT_CODE,
    )


def submit(jobs: Sequence[Job], workdir: str, options: Options) -> int:
    """Submits what has not finished and is not in the queue. Returns an exit code.

    Raises:
        ConfigError: if Slurm is not there, or refuses; or for options that are none.
    """
    folder = run_path(workdir)
    queued = _in_queue(folder)
    waiting = [job for job in jobs if _name(job, workdir) in queued]
    left = [job for job in jobs if job not in waiting and remaining(job)]
    if waiting:
        print(f"{len(waiting)} runs are in Slurm's queue already")
    if not left:
        print("nothing to submit")
        return 0
    script = dry_run(left, workdir, options)
    folder.mkdir(parents=True, exist_ok=True)
    pathlib.Path(_printed(workdir)).mkdir(parents=True, exist_ok=True)
    array = _slurm("sbatch", "--parsable", given=script).partition(";")[0]  # the cluster follows, where there are several
    write_json(folder / "slurm.json", _submitted(folder) | {array: [_name(job, workdir) for job in left]})
    print(f"job {array} of Slurm has {len(left)} runs; the first one prints to {_printed(left[0].run)}/log.txt")
    return 0


def stop(jobs: Sequence[Job], workdir: str) -> int:
    """Cancels what of the jobs is in the queue; training that runs saves first. Returns an exit code.

    Raises:
        ConfigError: if Slurm is not there, or refuses.
    """
    queued = _in_queue(run_path(workdir))
    tasks = [queued[name] for job in jobs if (name := _name(job, workdir)) in queued]
    if tasks:
        _slurm("scancel", "--quiet", *tasks)
    print(f"cancelled in Slurm's queue: {len(tasks)} of {len(jobs)} runs")
    return 0


def _checked(line: str) -> str:
    """An option of sbatch. Raises ConfigError if it is none, or one that belongs to the sweep."""
    if not line.startswith("-") or "\n" in line:
        raise ConfigError(f"--slurm is {line!r}; expected an option of sbatch, such as --slurm=--partition=gpu")
    if line.startswith(("--array", "-a")):
        raise ConfigError(f"--slurm is {line!r}, but the array is the sweep's own; expected --jobs=N for N runs at once")
    return line


def _commands(job: Job) -> str:
    """Lines of the script that do what remains of a job, up to the first command that fails."""
    return " &&\n".join(
        f"  {'each' if script == 'train.py' else 'one'} {shlex.join([sys.executable, str(_LAUNCH / script), *arguments])}"
        for script, *arguments in remaining(job)
    )


def _printed(path: str) -> str:
    """The folder, on the file system, for what a run or the sweep prints."""
    return path.rstrip("/").replace("gs://", "runs/", 1) if in_bucket(path) else path.rstrip("/")


def _name(job: Job, workdir: str) -> str:
    """A run by its folder below that of the sweep, however that is written."""
    return job.run.removeprefix(workdir.rstrip("/")).strip("/")


def _submitted(folder: epath.Path) -> dict[str, list[str]]:
    """The runs of each array that was submitted, in the order of its tasks. Raises RunError if their file is damaged."""
    path = folder / "slurm.json"
    try:
        return json.loads(read_whole(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); cancel what is in the queue, and remove it") from error


def _in_queue(folder: epath.Path) -> dict[str, str]:
    """The runs that wait or run, and which task each is. Raises ConfigError if Slurm is not there."""
    for command in _COMMANDS:
        if shutil.which(command) is None:
            raise ConfigError(f"--on=slurm, but there is no {command}; expected Slurm's commands, as on a cluster's login node")
    queued = set(_slurm("squeue", "--noheader", "--array", "--format=%F_%K").split())
    tasks = ((name, f"{array}_{index}") for array, names in _submitted(folder).items() for index, name in enumerate(names))
    return {name: task for name, task in tasks if task in queued}


def _slurm(*command: str, given: str | None = None) -> str:
    """What one of Slurm's commands prints. Raises ConfigError with its own words, if it refuses."""
    environment = {name: value for name, value in os.environ.items() if name in _READ_BY_SBATCH or not name.startswith("SLURM_")}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(done.stderr.strip() or f"{command[0]} ended with exit code {done.returncode}")
    print(done.stderr, end="", file=sys.stderr)
    return done.stdout.strip()
