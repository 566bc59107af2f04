"""What a dataset is, and what its registered entry makes of it: schema, layouts, sample windows, action histograms.

    python launch/inspect_data.py --dataset=fractal20220817_data
    python launch/inspect_data.py --dataset=fractal20220817_data --source=/data/fractal20220817_data/0.1.0
    python launch/inspect_data.py --source=runs/quickstart/data/demonstrations/1.0.0
    python launch/inspect_data.py --dataset=oxe_magic_soup --source=/data

--dataset is a registered dataset or a mixture; by default it is named as the folder --source is. With --source, the prepared
version's folder, the dataset's features are checked against its entry and `windows.png` and `actions.png` are written to --out.
Dimensions with rare values that `compat.percentile_clamp` would lose, or with values that may be errors, are named.
Of a mixture --source is the folder that holds its datasets, for their shares of samples. --register runs a Python file first,
which registers a dataset of your own.

--rerun=FILE.rrd or --rerun=connect logs --samples whole episodes to a recording of Rerun or to its viewer (docs/rerun.md).
"""

import pathlib
import runpy

import experiment
from absl import flags

from data_pipelines.inspection import Inspection, inspect
from mimic_video import rerun_log

_DATASET = flags.DEFINE_string("dataset", None, "Dataset of the registry, or mixture, by name; by default that of the folder")
_SOURCE = flags.DEFINE_string("source", None, "Prepared dataset, .../NAME/VERSION; of a mixture, the folder of NAMEs")
_SPLIT = flags.DEFINE_string("split", "train", "Split to read, or slices of it by episodes: 'train[:50]'")
_OUT = flags.DEFINE_string("out", "runs/inspect", "Folder for the pictures")
_EPISODES = flags.DEFINE_integer("episodes", 100, "Episodes, spread over the split, that histograms are of", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 4, "Windows to draw, and episodes to log", lower_bound=1)
_REGISTER = flags.DEFINE_string("register", None, "Python file that registers a dataset, such as configs/my_robot.py")
_RERUN = flags.DEFINE_string("rerun", None, rerun_log.HELP)


def main() -> None:
    if _REGISTER.value:
        runpy.run_path(_REGISTER.value)
    source = pathlib.Path(_SOURCE.value) if _SOURCE.value else None
    with rerun_log.opened(_RERUN.value, "mimic-video dataset") as log:
        options = Inspection(_SPLIT.value, pathlib.Path(_OUT.value), _EPISODES.value, _SAMPLES.value, log)
        inspect(_DATASET.value, source, options)


if __name__ == "__main__":  # DatasetError and SchemaError are ValueErrors
    experiment.run(main, (ValueError, OSError, ModuleNotFoundError), config=False, compilation_cache=None)
