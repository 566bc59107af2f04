"""Exports a trained policy as a bundle: one directory that needs nothing else, for a machine next to a robot.

    python launch/export.py --workdir=runs/quickstart/action --out=policies/drawers
    python launch/export.py --workdir=RUN --out=DIR --precision=bfloat16 --prompts=prompts.txt --stablehlo=cuda --safetensors

    policy = Policy.load("policies/drawers")

--workdir is a run directory of stage `action`; its newest checkpoint is taken, adapters merged, averaged if the run kept an
average. --precision is that of parameters and activations; that of the run unless given. --weights=int8 keeps the backbone's
blocks in eight bits a weight: the published policy takes 3.2 GB instead of 5.2 (pytest tests/models/test_quantization.py -s).
Instructions in --prompts, one a line, and with T5 those in the run's text cache, are encoded now, so that the robot's machine
needs no text encoder for them.

--stablehlo=cuda,tpu,cpu (with the extra `stablehlo`) adds programs that JAX and flatbuffers run without this package
(mimic_video/policy/stablehlo.py says how), for --batch_size robots. Only the platform that this command runs on has its fastest
attention; others have a general one, whose memory grows with the square of the tokens. --safetensors adds the networks in the
published names.

--push_to_hub=USER/NAME (with the extra `hub`) also puts the bundle on the Hugging Face Hub, with a model card that has the
results of the run's evaluation.json; `Policy.load("hf://USER/NAME")` reads it there (docs/sharing.md).
"""

import pathlib
from typing import Any

import experiment
from absl import flags

from mimic_video.config import ConfigError
from mimic_video.models.text import DamagedEntryError
from mimic_video.policy import hub
from mimic_video.policy.export import PLATFORMS, Programs, export_policy, known_prompts
from mimic_video.runs.storage import RunError, local_path, run_path

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of stage `action`", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory to write; it must not be there yet", required=True)
_PRECISION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "precision", None, ["bfloat16", "float32"], "Of the policy; that of the run unless given"
)
_WEIGHTS: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "weights", None, ["exact", "int8"], "Of the backbone's blocks; those of the run unless given"
)
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file of instructions, one a line, whose features go into the bundle")
_STABLEHLO: flags.FlagHolder[Any] = flags.DEFINE_list("stablehlo", [], f"Platforms to write programs for: {', '.join(PLATFORMS)}")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Robots of a StableHLO program", lower_bound=1)
_EMBODIMENT = flags.DEFINE_string("embodiment", None, "Robot of StableHLO programs, by its name, if there are several")
_SAFETENSORS = flags.DEFINE_bool("safetensors", False, "Add the networks in the published names")
_PUSH = flags.DEFINE_string("push_to_hub", None, "USER/NAME: repository of the Hugging Face Hub that the bundle goes to, too")
_PRIVATE = flags.DEFINE_bool("private", False, "A repository that --push_to_hub makes is private")
_LICENSE = flags.DEFINE_string(
    "license", None, "Licence of the weights in the model card, as the Hub calls it: apache-2.0, other"
)


def main() -> None:
    run, out = run_path(_WORKDIR.value), local_path(_OUT.value)
    if _PUSH.value:
        evaluation = hub.read_evaluation(run)
        hub.reserve(_PUSH.value, _PRIVATE.value)  # before what takes minutes
    elif _PRIVATE.value or _LICENSE.value:
        raise ConfigError("--private and --license are of a repository on the Hub; expected --push_to_hub=USER/NAME too")
    export_policy(
        run,
        out,
        precision=_PRECISION.value,
        weights=_WEIGHTS.value,
        prompts=known_prompts(pathlib.Path(_PROMPTS.value)) if _PROMPTS.value else (),
        programs=Programs(_STABLEHLO.value, _BATCH_SIZE.value, _EMBODIMENT.value),
        safetensors=_SAFETENSORS.value,
    )
    if _PUSH.value:
        commit = hub.push(out, _PUSH.value, license=_LICENSE.value, evaluation=evaluation)
        print(f"pushed it to {hub.SCHEME}{_PUSH.value}@{commit}")


if __name__ == "__main__":
    experiment.run(main, (RunError, DamagedEntryError), config=False, compilation_cache=None)
