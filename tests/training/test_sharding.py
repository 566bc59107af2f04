import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.training.sharding import global_batch, make_mesh, path_name, shardings
from mimic_video.training.steps import TRAINED, make_state, make_train_step, place, split_params
from mimic_video.vam import VideoActionModel

STAGES = ("video", "action")


@functools.cache
def trained(stage, data, fsdp):
    """Losses of two steps, and the parameters and moving average after them, on the first data·fsdp devices."""
    config = tiny.experiment(stage=stage, backbone={"num_blocks": 1}, decoder={"num_blocks": 1})
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    params, frozen = split_params(tiny.params(config), config)
    state, frozen = place(make_state(config, params), mesh), place(frozen, mesh)
    step, losses = make_train_step(VideoActionModel(config), mesh, state), []
    for seed in (0, 1):
        batch = tiny.batch(config, 8, seed)
        batch["video_mask"][0, 6:] = batch["action_mask"][5, 1:] = False
        state, metrics = step(state, frozen, global_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get((state.params, state.ema)), state


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_mesh_trains_as_one_device_does(stage, mesh):
    losses, params, _ = trained(stage, 1, 1)
    mesh_losses, mesh_params, _ = trained(stage, *mesh)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(mesh_losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mesh_params, params)


@pytest.mark.slow
def test_parameters_and_moments_are_split_over_fsdp():
    state = trained("action", 2, 4)[2]
    block = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert block.shape == (1, 16, 32) and block.addressable_shards[0].data.shape == (1, 4, 32)
    for tree in (state.params, state.ema, state.opt_state):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        split = {path_name(path) for path, leaf in leaves if leaf.addressable_shards[0].data.size * 4 == leaf.size > 4}
        whole = {path_name(path): leaf.size for path, leaf in leaves}
        assert {name for name in whole if name.endswith("blocks/mlp/down/kernel")} <= split
        assert sum(whole[name] for name in split) > 0.8 * sum(whole.values())


@pytest.mark.parametrize("stage", STAGES)
def test_every_matrix_of_a_block_is_split(stage):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    part = TRAINED[stage]
    params = jax.eval_shape(VideoActionModel(tiny.experiment(stage=stage)).init, jax.random.key(0))[part]
    found = jax.tree_util.tree_leaves_with_path(shardings({part: params}, mesh))
    specs = {path_name(path): sharding.spec for path, sharding in found}
    whole = [name for name, spec in specs.items() if "blocks" in name and name.endswith("kernel") and "fsdp" not in spec]
    assert whole == []
    assert specs[f"{part}/final_proj/kernel"] == PartitionSpec()


def test_a_batch_is_split_over_data_and_fsdp():
    mesh, rows = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    array = global_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(array, rows)
    shards = sorted((shard.index[0].start or 0, shard.data.shape) for shard in array.addressable_shards)
    assert shards == [(start, (2, 3)) for start in (0, 0, 2, 2, 4, 4, 6, 6)]


@pytest.mark.parametrize(("sizes", "expected"), [
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 1, 8), (1, 1, 8)),
])  # fmt: skip
def test_mesh_axes(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "sequence"), expected, strict=True))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1), (-1, 16, 1)])
def test_axes_that_do_not_multiply_to_the_devices(sizes):
    with pytest.raises(ConfigError, match=r"config field 'mesh' is .* must multiply to the 8 devices"):
        make_mesh(MeshConfig(*sizes))


def test_a_dimension_that_cannot_be_split_is_named():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    tree = {"decoder": {"blocks": {"mlp": {"down": {"kernel": np.zeros((2, 16, 12))}}}}}
    with pytest.raises(ConfigError, match=r"'mesh\.fsdp' is 8, .*decoder/blocks/mlp/down/kernel.*\(2, 16, 12\)"):
        place(tree, mesh)
