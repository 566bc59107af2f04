"""Trains one stage of an experiment, or continues it.

    python launch/train.py --config=configs/quickstart.py:video --workdir=runs/video
    python launch/train.py --config=configs/quickstart.py:action --config.backbone_run=runs/video --workdir=runs/action

With --robot=my_robot.py that file is run first, which registers the dataset of a robot (configs/my_robot.py).

With --profile=100:110 the steps 100 to 110 are traced, for TensorBoard's profiler or Perfetto.

The same command after an interruption continues from the last checkpoint and ends with the same parameters. It is an error if the
datasets have changed in between, or if another run is using the directory.

SIGTERM, Ctrl-C and the notice of Google Compute Engine make it finish its step, save and end with exit code 75: start it again.

On several hosts it runs once on each, or for each GPU under SLURM, with one --workdir for all; `mimic_video.parallel.distributed`
says how the processes find each other, and that all of them end when one fails.
"""

import pathlib
import runpy
import sys

import experiment
import jax
from absl import flags

from data_pipelines.assembly import TrainingData
from data_pipelines.sources.rlds import DatasetError
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.parallel.distributed import processes
from mimic_video.runs.storage import RunError, run_path
from mimic_video.training.loop import NonFiniteLossError, train
from mimic_video.training.preemption import EXIT_CODE, PreemptedError

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, or gs://BUCKET/FOLDER", required=True)
_ROBOT = flags.DEFINE_string("robot", None, "Python file that registers a robot's dataset, such as configs/my_robot.py")
_PROFILE = flags.DEFINE_string("profile", "", "FIRST:LAST, the steps of which a profiler's trace goes to WORKDIR/profile")


def profiled_steps() -> tuple[int, int] | None:
    """The first and the last step to trace. Raises ConfigError if --profile is not two numbers."""
    if not _PROFILE.value:
        return None
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--profile is {_PROFILE.value!r}; expected FIRST:LAST, two steps such as 100:110")
    return int(first), int(last)


def register_by(file: str) -> None:
    """Runs a file that registers datasets. Raises ConfigError if it is not there, or cannot be run or registered."""
    if not pathlib.Path(file).is_file():
        raise ConfigError(f"--robot: there is no file {file}")
    try:
        runpy.run_path(file)
    except (ImportError, SyntaxError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"--robot: {file} cannot be used: {type(error).__name__}: {error}") from error


def main(config: ExperimentConfig) -> None:
    if _ROBOT.value:
        register_by(_ROBOT.value)
    try:
        train(config, run_path(_WORKDIR.value), TrainingData(config), profiled_steps())
    except PreemptedError as stop:
        if jax.process_index() == 0:
            print(stop)
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    experiment.run(main, (DatasetError, NonFiniteLossError, RunError), inside=processes)
