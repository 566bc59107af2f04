"""The experiments of configs/, read as every other script reads one."""

import dataclasses
import importlib.util
import pathlib

from mimic_video.config import ExperimentConfig, MeshConfig, experiment_from

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = (  # all that are shipped, but for pods that differ in nothing but the mesh and the batch
    "published:bridge",
    "published:libero",
    "published:bridge_video",
    "published:libero_video",
    "published:cosmos",
    "published:cosmos_14b",
    "pretrain:video_v5e",
    "pretrain:action_v5e",
    "small:half_video",
    "small:half_action",
    "small:colab_video",
    "small:colab_action",
    "quickstart:video",
    "quickstart:action",
)


def shipped(name: str) -> ExperimentConfig:
    """The experiment of a configuration file and its argument, on one device."""
    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(experiment_from(module.get_config(argument).to_dict()), mesh=MeshConfig())


def all_shipped() -> dict[str, ExperimentConfig]:
    """Every one of `EXPERIMENTS`, by its name."""
    return {name: shipped(name) for name in EXPERIMENTS}
