"""Reads a recording of a robot and writes an experiment for it, which trains as it is.

    python launch/new_robot.py --source=/data/my_recording
    python launch/new_robot.py --source=OWNER/NAME --out=configs/mine.py

--source is a LeRobot folder (v2.0 to v3.0), a prepared RLDS folder, or a LeRobot dataset of the Hugging Face Hub, which is
downloaded. The file has the dataset's entry of the registry (cameras, rate, what proprioception and actions are) and both
stages, `:video` and `:action`, at the size of configs/quickstart.py. What the recording does not tell for sure is printed, and
stands at the beginning of the file, with what to change (docs/your_robot.md). LeRobot datasets are read where they lie.
"""

import experiment
from absl import flags

from data_pipelines.new_robot import new_robot

_SOURCE = flags.DEFINE_string("source", None, "Folder of a dataset, or OWNER/NAME of the Hugging Face Hub", required=True)
_OUT = flags.DEFINE_string("out", None, "Experiment file to write; configs/NAME.py by default")
_CONTROL_HZ = flags.DEFINE_float("control_hz", None, "Steps per second of a recording that does not say", lower_bound=1e-3)


def main() -> None:
    new_robot(_SOURCE.value, _OUT.value, _CONTROL_HZ.value)


if __name__ == "__main__":  # DatasetError is a ValueError
    experiment.run(main, (FileExistsError, ModuleNotFoundError, ValueError), config=False, compilation_cache=None)
