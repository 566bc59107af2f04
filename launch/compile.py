"""Compiles an experiment's training step, or its policy, for chips that this machine does not have, and says how it would run.

    launch/setup.sh compile
    python launch/compile.py --config=configs/pretrain.py:video_v5e --topology=v5e:16x16 [--slices=2] [--out=FILE.json]
    python launch/compile.py --config=configs/published.py:bridge --topology=v6e:1x1 --program=policy --batch_size=1
    python launch/compile.py --config=configs/small.py:half_video --platform=cuda [--devices=8] [--capability=9.0]

For a TPU the whole program is compiled. Exit code: 0 if it fits the chip's memory, 2 if it does not, 1 for errors. The JSON has
bytes, operations and seconds of one chip: its memory by kind; the model's FLOPs as traced, and the program's, which has what
is computed again; communication by kind; and how long a step takes at least if only arithmetic, memory traffic or communication
took time.

For a GPU the program is lowered: what cuDNN's attention cannot do is found, and the JSON has the memory of arguments, the largest
arrays, the model's FLOPs, and which attention was chosen. Compiling it takes a GPU, so what it needs in all is not known.
"""

import pathlib
import sys

import experiment
import jax
from absl import flags

from mimic_video.analysis import compile_report
from mimic_video.analysis.aot import TopologyError
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.runs.directory import write_json

_PLATFORM = flags.DEFINE_enum("platform", "tpu", ["tpu", "cuda"], "What is compiled for")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Name of the TPU topology, such as v5e:16x16 or v5p:4x4x8")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the data centre's network", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", 1, "GPUs that the step is spread over", lower_bound=1)
_CAPABILITY = flags.DEFINE_string("capability", "9.0", "Compute capability of the GPUs: 9.0 of an H100, 8.0 of an A100")
_PROGRAM = flags.DEFINE_enum("program", "step", ["step", "policy"], "A training step, or the policy on one chip")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Robots that the policy plans for at once", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "File for the report")

DOES_NOT_FIT = 2


def require_no_other_flags() -> None:
    """Raises ConfigError for a flag that says nothing for this platform and program."""
    platform, program = f"--platform={_PLATFORM.value}", f"--program={_PROGRAM.value}"
    unused = dict.fromkeys(("topology", "slices") if _PLATFORM.value == "cuda" else ("devices", "capability"), platform)
    unused |= {"batch_size": program} if _PROGRAM.value == "step" else {"devices": f"{program}, which is for one chip"}
    for name, reason in unused.items():
        if flags.FLAGS[name].present:
            raise ConfigError(f"--{name} is given, which says nothing for {reason}")


def main(config: ExperimentConfig) -> None:
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has, nothing is run on it
    require_no_other_flags()
    robots = _BATCH_SIZE.value if _PROGRAM.value == "policy" else 0
    if _PLATFORM.value == "cuda":
        values = compile_report.gpu_report(config, _DEVICES.value, _CAPABILITY.value, robots)
        summary = compile_report.gpu_summary(values)
    elif _TOPOLOGY.value:
        values = compile_report.tpu_report(config, _TOPOLOGY.value, _SLICES.value, robots)
        summary = compile_report.tpu_summary(values)
    else:
        raise ConfigError("--topology is missing: the TPU to compile for, such as v5e:16x16, or --platform=cuda for GPUs")
    if _OUT.value:
        write_json(pathlib.Path(_OUT.value), values)
    print(summary, flush=True)
    if not values.get("fits", True):
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    experiment.run(main, (TopologyError,), compilation_cache=False)  # what compiling takes is reported
