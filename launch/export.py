"""Exports a trained policy as a bundle: one directory that needs nothing else, for a machine next to a robot.

    python launch/export.py --checkpoint=runs/quickstart/action --out=policies/drawers
    python launch/export.py --checkpoint=RUN --out=DIR --precision=bfloat16 --prompts=prompts.txt --stablehlo=cuda --safetensors

    policy = Policy.load("policies/drawers")

--checkpoint is a run directory of stage `action`; its newest checkpoint is taken, adapters merged, averaged if the run kept an
average. --precision is that of parameters and activations; that of the run unless given. --weights=int8 keeps the backbone's
blocks in eight bits a weight: the published policy takes 3.2 GB instead of 5.2 (pytest tests/models/test_quantization.py -s).
Instructions in --prompts, one a line, and with T5 those in the run's text cache, are encoded now, so that the robot's machine
needs no text encoder for them.

--stablehlo=cuda,tpu,cpu adds programs that JAX runs without this package (mimic_video/policy/stablehlo.py says how), for --batch
robots. Only the platform that this command runs on has its fastest attention; others have a general one, whose memory grows with
the square of the tokens. --safetensors adds the networks in the published names.
"""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

from absl import app, flags, logging
from etils import epath

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment, choose
from mimic_video.models.text import DamagedEntryError, T5TextEncoder, make_text_encoder
from mimic_video.policy.bundle import new_bundle, write_policy
from mimic_video.policy.policy import Policy
from mimic_video.policy.stablehlo import Platform, attention_for, write_programs
from mimic_video.runs.checkpoints import load_params
from mimic_video.runs.directory import load_embodiments, read_config
from mimic_video.runs.storage import RunError, local_path, run_path
from mimic_video.vam import Params, VideoActionModel
from mimic_video.weights.layout import write_networks

_PLATFORMS = ("cuda", "tpu", "cpu")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory of stage `action`", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory to write; it must not be there yet", required=True)
_PRECISION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "precision", None, ["bfloat16", "float32"], "Of the policy; that of the run unless given"
)
_WEIGHTS: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "weights", None, ["exact", "int8"], "Of the backbone's blocks; those of the run unless given"
)
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file of instructions, one a line, whose features go into the bundle")
_STABLEHLO: flags.FlagHolder[Any] = flags.DEFINE_list(
    "stablehlo", [], f"Platforms to write programs for: {', '.join(_PLATFORMS)}"
)
_BATCH = flags.DEFINE_integer("batch", 1, "Robots of a StableHLO program", lower_bound=1)
_EMBODIMENT = flags.DEFINE_string("embodiment", None, "Robot of StableHLO programs, by its dataset's name, if there are several")
_SAFETENSORS = flags.DEFINE_bool("safetensors", False, "Add the networks in the published names")


def load(
    run: epath.Path, precision: Literal["bfloat16", "float32"] | None, weights: Literal["exact", "int8"] | None
) -> tuple[ExperimentConfig, Params, int]:
    """Configuration with the wanted precision and weights, parameters, and their step."""
    trained = read_config(run)
    if trained.stage != "action":
        raise RunError(f"{run} holds a run of stage '{trained.stage}'; a policy needs stage 'action'")
    config = dataclasses.replace(trained, precision=precision or trained.precision)
    params, step = load_params(run, "configured" if config == trained else "stored")
    policy = dataclasses.replace(config.policy, weights=weights or config.policy.weights)
    return dataclasses.replace(config, policy=policy), VideoActionModel(config).cast(params), step


def known_text(config: ExperimentConfig) -> dict:
    """Features of the instructions of --prompts and of the run's text cache."""
    prompts = []
    if _PROMPTS.value:
        try:
            prompts = [line.strip() for line in pathlib.Path(_PROMPTS.value).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts={_PROMPTS.value} cannot be read: {error}") from error
        if not prompts:
            raise ConfigError(f"--prompts={_PROMPTS.value} has no instructions; expected one a line")
    encoder = make_text_encoder(config.text, config.backbone.text_width)
    if isinstance(encoder, T5TextEncoder):
        prompts += encoder.kept()
    return {prompt: encoder(prompt) for prompt in prompts}


def policies(config: ExperimentConfig, params: Params, robot: Embodiment) -> dict[Platform, Policy]:
    """The policy as each platform of --stablehlo can have it."""
    return {
        platform: Policy(dataclasses.replace(config, attention=attention_for(platform)), params, robot)
        for platform in _STABLEHLO.value
    }


def export() -> None:
    run, out = run_path(_CHECKPOINT.value), local_path(_OUT.value)
    unknown = set(_STABLEHLO.value) - set(_PLATFORMS)
    if unknown:
        raise ConfigError(f"--stablehlo={','.join(_STABLEHLO.value)} has {', '.join(sorted(unknown))}; expected {_PLATFORMS}")
    config, params, step = load(run, _PRECISION.value, _WEIGHTS.value)
    embodiments = load_embodiments(run)
    robot = choose(embodiments, _EMBODIMENT.value) if _STABLEHLO.value else None
    text = known_text(config)
    with new_bundle(out, step) as folder:
        write_policy(folder, config, VideoActionModel(config).policy_params(params), embodiments, text)
        if robot is not None:
            write_programs(folder / "stablehlo", policies(config, params, robot), _BATCH.value)
        if _SAFETENSORS.value:
            for line in write_networks(folder / "safetensors", "policy", config, params, "safetensors"):
                print(line.replace(str(folder), str(out)))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}: step {step} of {run}, {config.precision}, {len(text)} known instructions, {size / 1e6:.1f} MB")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax and JAX narrate
    try:
        export()
    except (ConfigError, RunError, DamagedEntryError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
