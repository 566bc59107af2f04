import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.training.sharding import global_batch, make_mesh, path_name, shardings
from mimic_video.training.steps import TRAINED, place
from mimic_video.vam import VideoActionModel

STAGES = ("video", "action")


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
