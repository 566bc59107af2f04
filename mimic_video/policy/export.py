"""A trained run → a bundle, with text features, programs and published weights as asked for."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Literal, get_args

from etils import epath

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import choose
from mimic_video.models.text import T5TextEncoder, make_text_encoder, read_prompts
from mimic_video.policy.bundle import new_bundle, write_policy
from mimic_video.policy.policy import Policy
from mimic_video.policy.stablehlo import Platform, attention_for, write_programs
from mimic_video.runs.checkpoints import load_params
from mimic_video.runs.directory import load_embodiments, read_policy_config
from mimic_video.vam import Params, VideoActionModel
from mimic_video.weights.layout import write_networks

PLATFORMS: tuple[Platform, ...] = get_args(Platform)


def load(
    run: epath.Path, precision: Literal["bfloat16", "float32"] | None, weights: Literal["exact", "int8"] | None
) -> tuple[ExperimentConfig, Params, int]:
    """Configuration with the wanted precision and weights, parameters, and their step."""
    trained = read_policy_config(run)
    config = dataclasses.replace(trained, precision=precision or trained.precision)
    params, step = load_params(run, "configured" if config == trained else "stored")
    policy = dataclasses.replace(config.policy, weights=weights or config.policy.weights)
    return dataclasses.replace(config, policy=policy), VideoActionModel(config).cast(params), step


def known_prompts(path: pathlib.Path) -> list[str]:
    """`read_prompts`; raises ConfigError also if there are none."""
    prompts = read_prompts(path)
    if not prompts:
        raise ConfigError(f"--prompts={path} has no instructions; expected one a line")
    return prompts


def known_text(config: ExperimentConfig, prompts: Sequence[str]) -> dict:
    """Features of instructions and of those in the run's text cache."""
    encoder = make_text_encoder(config.text, config.backbone.text_width)
    kept = encoder.kept() if isinstance(encoder, T5TextEncoder) else []
    return {prompt: encoder(prompt) for prompt in [*prompts, *kept]}


@dataclasses.dataclass(frozen=True)
class Programs:
    """StableHLO programs of a bundle."""

    platforms: Sequence[Platform] = ()
    batch: int = 1  # robots of a program
    embodiment: str | None = None  # robot that they drive, if the policy knows several

    def __post_init__(self):
        if unknown := set(self.platforms) - set(PLATFORMS):
            raise ConfigError(f"--stablehlo={','.join(self.platforms)} has {', '.join(sorted(unknown))}; expected {PLATFORMS}")
        if self.platforms and importlib.util.find_spec("flatbuffers") is None:
            raise ConfigError(
                f"--stablehlo={','.join(self.platforms)}: the package flatbuffers, with which JAX writes programs, is missing; "
                "expected after pip install 'mimic-video-jax[stablehlo]'"
            )


def export_policy(
    run: epath.Path,
    out: pathlib.Path,
    *,
    precision: Literal["bfloat16", "float32"] | None = None,
    weights: Literal["exact", "int8"] | None = None,
    prompts: Sequence[str] = (),
    programs: Programs = Programs(),
    safetensors: bool = False,
) -> None:
    """Writes the policy of a run's newest checkpoint as a bundle, and prints what it is.

    Args:
        precision, weights: those of the run unless given.
        prompts: instructions whose features go into the bundle, besides those of the run's text cache.
        safetensors: adds the networks in the published names.

    Raises:
        RunError: if the run is not of stage `action`, or the bundle cannot be written; ConfigError for a wrong robot.
    """
    config, params, step = load(run, precision, weights)
    embodiments = load_embodiments(run)
    robot = choose(embodiments, programs.embodiment) if programs.platforms else None
    text = known_text(config, prompts)
    with new_bundle(out, step) as folder:
        write_policy(folder, config, VideoActionModel(config).policy_params(params), embodiments, text)
        if robot is not None:
            policies = {
                platform: Policy(dataclasses.replace(config, attention=attention_for(platform)), params, robot)
                for platform in programs.platforms
            }
            write_programs(folder / "stablehlo", policies, programs.batch)
        if safetensors:
            for line in write_networks(folder / "safetensors", "policy", config, params, "safetensors"):
                print(line.replace(str(folder), str(out)))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}: step {step} of {run}, {config.precision}, {len(text)} known instructions, {size / 1e6:.1f} MB")
