"""Trains every point of a sweep, or a single run: on this machine, with Slurm, on Cloud TPUs, or where SkyPilot finds machines.

    python launch/sweep.py --config=configs/quickstart.py:action --sweep=lr,seed --workdir=runs/sweep [--jobs=2] [--then=evaluate]
    python launch/sweep.py --config=... --sweep=... --workdir=DIR --on=slurm --slurm=--partition=gpu --slurm=--gpus-per-task=1
    python launch/sweep.py --config=... --workdir=gs://BUCKET/DIR --on=tpu --accelerator_type=v5litepod-256
    python launch/sweep.py --workdir=runs/sweep --report [--metric=success]

Sweeps are declared in the experiment's file: `def sweep():` yields {"train.learning_rate": 3e-4, ...} for each point, and
--sweep=lr,seed multiplies `sweep_lr()` by `sweep_seed()`. All points are checked before anything starts. Without any sweep there
is one run, in --workdir itself.

The same command again continues whatever has not finished, from another machine too. --dry_run prints what would be done;
--report writes WORKDIR/sweep.csv and sweep.html, also of a sweep that is under way; --stop ends one that runs elsewhere.
Exit codes: 0 if all have finished (elsewhere: if all were handed over), 1 if any failed, 75 if it was asked to stop.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import experiment
import rich
from absl import flags
from etils import epath
from sweeps import local, points, sky, slurm, tpu
from sweeps.screen import shown

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.evaluation.sweep_report import table, write_results
from mimic_video.evaluation.sweep_results import Entry, results, save_entries
from mimic_video.runs.directory import require_resumable
from mimic_video.runs.storage import RunError, run_path

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep, or gs://BUCKET/FOLDER", required=True)
_SWEEP = flags.DEFINE_list("sweep", None, "Sweeps of the experiment's file that are multiplied; empty for a single run")
_ON = flags.DEFINE_enum("on", "local", ["local", "slurm", "tpu", "sky"], "Where it runs")
_JOBS = flags.DEFINE_integer("jobs", 0, "Runs at once; 0 for one a GPU here, and all elsewhere", lower_bound=0)
_THEN = flags.DEFINE_enum("then", None, ["evaluate"], "What follows each training")
_METRIC = flags.DEFINE_string("metric", None, "What points are sorted by: success, validation or a metric's name")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be done in place of doing it")
_REPORT = flags.DEFINE_bool("report", False, "Write the results of a sweep, whatever state it is in")
_STOP = flags.DEFINE_bool("stop", False, "End what of the sweep waits or runs elsewhere")
_SLURM = flags.DEFINE_multi_string("slurm", [], "slurm: an option of sbatch, such as --partition=gpu; once for each")
_ACCELERATOR_TYPE = flags.DEFINE_string("accelerator_type", None, "tpu: slice of a run, such as v5litepod-16")
_SLICES = flags.DEFINE_integer("slices", 1, "tpu: slices of a run, joined by the data centre's network", lower_bound=1)
_PROVISIONING = flags.DEFINE_enum(
    "provisioning", "spot", ["spot", "reserved", "on_demand"], "tpu, sky: how machines are asked for"
)
_INFRA = flags.DEFINE_string("infra", None, "sky: CLOUD/REGION of the machines, such as gcp/us-west4")
_ACCELERATORS = flags.DEFINE_string("accelerators", None, "sky: of a machine, such as H100:8 or tpu-v5litepod-16")
_NODES = flags.DEFINE_integer("nodes", 1, "sky: machines of a run", lower_bound=1)

# Flags that say something only on some of the targets.
_OF = {
    "slurm": ("slurm",),
    "accelerator_type": ("tpu",),
    "slices": ("tpu",),
    "provisioning": ("tpu", "sky"),
    "infra": ("sky",),
    "accelerators": ("sky",),
    "nodes": ("sky",),
    "stop": ("slurm", "tpu", "sky"),
}


class Target(NamedTuple):
    """Where runs go. All three get the jobs; one returns a text, the others an exit code."""

    dry_run: Callable[[Sequence[points.Job]], str]
    run: Callable[[Sequence[points.Job]], int]
    stop: Callable[[Sequence[points.Job]], int] | None = None


def target(workdir: epath.Path, entries: Sequence[Entry]) -> Target:
    """That of --on. Raises ConfigError for a flag that is missing, or says nothing there."""
    for name, places in _OF.items():
        if flags.FLAGS[name].present and _ON.value not in places:
            raise ConfigError(f"--{name} is given, which says nothing for --on={_ON.value}")
    folder, at_once = _WORKDIR.value, _JOBS.value
    if _ON.value == "slurm":
        lines = slurm.Options(tuple(_SLURM.value), at_once)
        return Target(
            lambda jobs: slurm.dry_run(jobs, folder, lines),
            lambda jobs: slurm.submit(jobs, folder, lines),
            lambda jobs: slurm.stop(jobs, folder),
        )
    if _ON.value == "tpu":
        slices = tpu.Options(
            _required(_ACCELERATOR_TYPE), _SLICES.value, cast(tpu.Provisioning, _PROVISIONING.value), jobs=at_once
        )
        return Target(lambda jobs: tpu.dry_run(jobs, folder, slices), lambda jobs: tpu.run(jobs, folder, slices), tpu.stop)
    if _ON.value == "sky":
        if _PROVISIONING.value == "reserved":
            raise ConfigError("--provisioning is 'reserved'; expected spot or on_demand for --on=sky")
        spot = _PROVISIONING.value == "spot"
        machines = sky.Options(_required(_INFRA), _required(_ACCELERATORS), _NODES.value, spot)
        return Target(lambda jobs: sky.dry_run(jobs, folder, machines), lambda jobs: sky.submit(jobs, folder, machines), sky.stop)

    def on_screen() -> contextlib.AbstractContextManager[None]:
        return shown(lambda: results(workdir, entries), _METRIC.value)

    return Target(
        lambda jobs: local.dry_run(jobs, at_once),
        lambda jobs: local.run(jobs, at_once, on_screen),
    )


def _required(flag: flags.FlagHolder) -> str:
    if flag.value is None:
        raise ConfigError(f"--{flag.name} is missing, which --on={_ON.value} needs: {flags.FLAGS[flag.name].help}")
    return flag.value


def main(config: ExperimentConfig | None) -> None:
    workdir = run_path(_WORKDIR.value)
    if _REPORT.value:
        rich.print(table(write_results(workdir, _METRIC.value), _METRIC.value))
        return
    if config is None:
        raise ConfigError("--config is missing: the experiment to train; only --report needs none")
    chosen, repeated = points.expand(experiment.config_arguments(sys.argv[1:]), _SWEEP.value)
    entries = [point.entry for point in chosen]
    jobs = points.jobs(chosen, _WORKDIR.value, evaluate=_THEN.value == "evaluate")
    place = target(workdir, entries)
    if _STOP.value and place.stop:
        sys.exit(place.stop(jobs))
    for job in jobs:
        require_resumable(run_path(job.run), job.config)
    for name, same in repeated.items():
        print(f"{name} is the same experiment as {same}, and left out")
    unfinished = [job for job in jobs if points.remaining(job)]
    print(f"{len(chosen)} points in {len(jobs)} runs, of which {len(jobs) - len(unfinished)} have finished", flush=True)
    plan = place.dry_run(unfinished) if unfinished else "nothing to do"  # which checks what the place cannot do
    if _DRY_RUN.value:
        print(plan)
        return
    save_entries(workdir, entries)
    code = place.run(jobs)
    if _ON.value == "local":
        write_results(workdir, _METRIC.value)
    sys.exit(code)


if __name__ == "__main__":
    experiment.run(main, (RunError, ModuleNotFoundError), config=None, compilation_cache=None)
