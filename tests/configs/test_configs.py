"""Every experiment that is shipped, and everything it can be asked for."""

import dataclasses
import importlib.util
import math
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh

from mimic_video.batch import batch_shapes
from mimic_video.config import CompatConfig, ExperimentConfig, experiment_from
from mimic_video.parallel.sharding import require_divisible, shardings
from mimic_video.stages import join_params, split_params
from mimic_video.training.steps import make_state
from mimic_video.vam import VideoActionModel

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def shipped(name: str, argument: str) -> ExperimentConfig:
    return experiment_from(module(name).get_config(argument).to_dict())


def chips(topology: str) -> int:
    """16x16 → 256."""
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))


EXPERIMENTS = [
    (name, argument, topology)
    for name in ("published", "pretrain", "small")
    for argument, topology in module(name).TOPOLOGIES.items()
]
EXPERIMENTS += [("quickstart", "video", ":1"), ("quickstart", "action", ":1")]


@pytest.mark.parametrize(("name", "argument", "topology"), EXPERIMENTS)
def test_every_experiment_is_valid_and_fits_its_mesh(name, argument, topology):
    config = shipped(name, argument)
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.sequence]
    if -1 in sizes:
        sizes[sizes.index(-1)] = chips(topology) // -math.prod(sizes)
    assert math.prod(sizes) == chips(topology)
    mesh = AbstractMesh(tuple(sizes), ("data", "fsdp", "sequence"))
    require_divisible(config.train.batch_size // config.train.micro_batches, mesh)

    vam = VideoActionModel(config)
    trained, frozen = jax.eval_shape(lambda: split_params(vam.init(jax.random.key(0)), config))
    shardings(jax.eval_shape(lambda trained: make_state(config, trained), trained), mesh)
    shardings(frozen, mesh)

    def loss(trained, frozen, batch):
        return vam.loss(join_params(trained, frozen, config), batch, vam.draw(jax.random.key(0), config.train.batch_size))[0]

    assert jax.eval_shape(loss, trained, frozen, batch_shapes(config, config.train.batch_size)).shape == ()


@pytest.mark.parametrize("name", ["published", "pretrain", "small"])
def test_an_unknown_experiment_is_told_the_known_ones(name):
    known = ", ".join(module(name).TOPOLOGIES)
    with pytest.raises(ValueError, match=f"fractal is unknown; expected one of {known}"):
        shipped(name, "fractal")


@pytest.mark.parametrize(
    ("name", "stage", "blocks"),
    [
        ("bridge", "action", 28),
        ("bridge_video", "video", 28),
        ("libero", "action", 28),
        ("libero_video", "video", 28),
        ("cosmos", "video", 28),
        ("cosmos_14b", "video", 36),
    ],
)
def test_published_experiments(name, stage, blocks):
    config = shipped("published", name)
    assert (config.stage, config.backbone.num_blocks, config.backbone.text_width) == (stage, blocks, 1024)
    assert config.compat == CompatConfig.published() and all(dataclasses.astuple(config.compat))
    assert (config.tokenizer.kind, config.text.kind, config.precision) == ("wan", "t5", "bfloat16")
    horizon, rate = {"libero": (60, 20.0)}.get(name, (15, 5.0))  # SPEC 8.4
    assert (config.data.action_horizon, config.data.control_hz) == (horizon, rate)


@pytest.mark.parametrize(("name", "argument", "_"), EXPERIMENTS)
def test_only_decoders_as_published_lose_rare_commands(name, argument, _):
    assert shipped(name, argument).compat.percentile_clamp == (name == "published")


def test_the_published_recipes():
    """SPEC 4.3 and 4.4."""
    for name, batch in (("bridge_video", 64), ("libero_video", 32), ("bridge", 256), ("libero", 128)):
        train, lora = (getattr(shipped("published", name), part) for part in ("train", "lora"))
        assert (train.batch_size, train.betas, train.weight_decay, train.clip_norm) == (batch, (0.9, 0.99), 0.1, 10.0)
        if name.endswith("video"):
            assert (lora.rank, lora.alpha, train.learning_rate) == (256, 32.0, 10**-3.75)
            assert (train.schedule, train.warmup_steps) == ("constant", 0)
        else:
            assert (lora.rank, train.learning_rate, train.schedule) == (0, 1e-4, "linear")
            assert (train.warmup_steps, train.schedule_steps, train.final_fraction) == (1000, 500_000, 0.2)


def test_adapters_are_as_many_as_published():
    """SPEC 4.3: 370,690,048 parameters of adapters and 177,733,632 of modulations."""
    config = shipped("published", "bridge_video")
    trained, _ = jax.eval_shape(lambda: split_params(VideoActionModel(config).init(jax.random.key(0)), config))
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in trained.items()}
    assert counts == {"lora": 370_690_048, "backbone": 177_733_632}
