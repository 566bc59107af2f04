"""Parameters to start from, out of another run."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from run_states import random_like

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.parallel.sharding import make_mesh
from mimic_video.runs import checkpoints, directory
from mimic_video.trees import named_leaves

CONFIG = tiny.experiment(stage="video", precision="bfloat16", backbone={"num_blocks": 1})
UP = "backbone/blocks/mlp/up/kernel"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of stage `video`, and its parameters by path."""
    params = random_like(tiny.params(CONFIG), 3)
    run = tmp_path_factory.mktemp("start") / "run"
    checkpoints.save_converted(run, CONFIG, params)
    return run, named_leaves(params)


def load_start(run, start_map, target):
    return checkpoints.load_start(run, start_map, target, make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))


@pytest.fixture
def target(run):
    """What a backbone of the same shapes would be started into: float32 on the second device."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=where)
        for name, leaf in run[1].items()
        if name.startswith("backbone/")
    }


def renamed(target, before, after):
    return {name.replace(before, after): leaf for name, leaf in target.items()}


def assert_started(started, expected):
    assert started.keys() == expected.keys()
    for name, leaf in started.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
        assert leaf.dtype == np.float32 and leaf.sharding.device_set == {jax.devices()[1]}


def test_without_a_map_paths_are_the_same_in_both_runs(run, target):
    assert_started(load_start(run[0], (), target), {name: run[1][name] for name in target})


def test_the_first_pair_that_matches_says_where_a_parameter_is(run, target):
    start_map = (("blocks/mlp/up", ""), (r"^network/(blocks|final)", r"backbone/\1"), ("network", "backbone"))
    started = load_start(run[0], start_map, renamed(target, "backbone/", "network/"))
    assert_started(started, {name.replace("backbone/", "network/"): run[1][name] for name in target if "mlp/up" not in name})


def test_parameters_that_are_not_there_are_named_with_the_nearest(run, target):
    target = renamed(target, "mlp/up", "mlp/upp")
    with pytest.raises(directory.RunError) as error:
        load_start(run[0], (), target)
    message = f"backbone/blocks/mlp/upp/kernel: there is no backbone/blocks/mlp/upp/kernel in {run[0]} (the nearest is {UP})"
    assert message in str(error.value)


def test_every_shape_that_differs_is_named_with_both(run, target):
    for name in (UP, "backbone/blocks/mlp/down/kernel"):
        target[name] = target[name].update(shape=(5, 6, 7))
    with pytest.raises(directory.RunError) as error:
        load_start(run[0], (), target)
    assert f"{UP} has shape (5, 6, 7), {UP} there (1, 16, 32)" in str(error.value)
    assert "mlp/down/kernel has shape (5, 6, 7), backbone/blocks/mlp/down/kernel there (1, 32, 16)" in str(error.value)


def test_a_parameter_there_is_not_used_twice(run, target):
    with pytest.raises(directory.RunError, match=f"{UP} is used more than once"):
        load_start(run[0], (("copy", "up"),), target | {"backbone/blocks/mlp/copy/kernel": target[UP]})


@pytest.mark.parametrize(
    ("start_map", "message"),
    [
        ((("decoder/", "backbone/"),), r"patterns \['decoder/'\] that no parameter is the first to match"),
        ((("backbone(", "x"),), "expected regular expressions: "),
        ((("backbone", r"\3"),), "expected regular expressions: invalid group reference"),
    ],
)
def test_a_map_that_means_nothing_is_an_error(run, target, start_map, message):
    with pytest.raises(ConfigError, match=message):
        load_start(run[0], start_map, target)


def test_a_damaged_run_to_start_from_is_an_error(run, target, tmp_path):
    copied = shutil.copytree(run[0], tmp_path / "run")
    (copied / "checkpoints" / "0" / "params" / "_METADATA").unlink()
    with pytest.raises(directory.RunError, match=r"0/params is damaged: .*; there is no earlier checkpoint"):
        load_start(copied, (), target)
