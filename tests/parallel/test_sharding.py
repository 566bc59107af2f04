import dataclasses

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.parallel.sharding import batch_rows, global_batch, make_mesh, place, shardings
from mimic_video.stages import TRAINED
from mimic_video.trees import path_name

STAGES = ("video", "action")


@pytest.mark.parametrize("stage", STAGES)
def test_every_matrix_of_a_block_is_split(stage):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    part = TRAINED[stage]
    params = tiny.shapes(tiny.experiment(stage=stage))[part]
    found = jax.tree_util.tree_leaves_with_path(shardings({part: params}, mesh))
    specs = {path_name(path): sharding.spec for path, sharding in found}
    whole = [name for name, spec in specs.items() if "blocks" in name and name.endswith("kernel") and "fsdp" not in spec]
    assert whole == []
    assert specs[f"{part}/final_proj/kernel"] == PartitionSpec()


def test_large_arrays_that_no_rule_names_are_split_along_their_longest_dimension():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shapes = {"mixer": (3, 512, 1024), "odd": (3, 1023, 1024), "short": (512, 1024), "prime": (1021, 1031)}
    specs = {
        name: where.spec
        for name, where in shardings(
            {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}, mesh
        ).items()
    }
    assert specs == {
        "mixer": PartitionSpec(None, None, "fsdp"),
        "odd": PartitionSpec(None, None, "fsdp"),
        "short": PartitionSpec(),
        "prime": PartitionSpec(),
    }
    large = {"kernel": jax.ShapeDtypeStruct((2048, 1024), "float32")}
    kept = shardings({"tokenizer": large, "lora": large}, mesh)  # by rules
    assert [where.spec for where in jax.tree.leaves(kept)] == [PartitionSpec()] * 2


def test_a_batch_is_split_over_data_and_fsdp():
    mesh, rows = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    array = global_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(array, rows)
    shards = sorted((shard.index[0].start or 0, shard.data.shape) for shard in array.addressable_shards)
    assert shards == [(start, (2, 3)) for start in (0, 0, 2, 2, 4, 4, 6, 6)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, 8), (1, 1, 8)),
    ],
)
def test_mesh_axes(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "sequence"), expected, strict=True))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh has to know of a TPU chip; four are a host."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0

    @property
    def process_index(self) -> int:
        return self.id // 4


def chips(slices):
    """Slices of 4x4 chips."""
    return [Chip(i, (i % 4, i // 4 % 4, 0), i // 16) for i in range(16 * slices)]


@pytest.mark.parametrize(
    ("slices", "sizes"),
    [
        (1, (1, 16, 1)),
        (1, (2, 4, 2)),
        (1, (2, 1, 8)),
        (2, (-1, 16, 1)),
        (2, (4, -1, 2)),
        (2, (-1, 2, 4)),
        (4, (4, 4, 4)),
        (4, (64, 1, 1)),
    ],
)
def test_copies_of_the_parameters_lie_within_a_slice_and_samples_on_neighbours(slices, sizes):
    mesh = make_mesh(MeshConfig(*sizes), chips(slices))
    assert len(set(mesh.devices.flat)) == 16 * slices
    per_copy = [{chip.slice_index for chip in copy.flat} for copy in mesh.devices]
    assert [len(each) for each in per_copy] == [1] * len(per_copy) and set.union(*per_copy) == set(range(slices))
    for sample in mesh.devices.reshape(-1, mesh.shape["sequence"]):
        extents = np.ptp([chip.coords for chip in sample], axis=0) + 1
        assert np.prod(extents) == len(sample)  # a rectangle of chips


def test_slices_that_do_not_divide_data():
    with pytest.raises(ConfigError, match=r"config field 'mesh\.data' is 1; expected a multiple of the 2 TPU slices"):
        make_mesh(MeshConfig(data=1, fsdp=-1), chips(2))


def test_rows_of_a_batch_are_those_of_a_hosts_chips():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, sequence=2), chips(1))
    groups = [group for group in range(8) if any(chip.id < 4 for chip in mesh.devices[0, group])]
    assert groups not in ([0], list(range(len(groups))))  # not side by side
    assert batch_rows(24, mesh) == [row for group in groups for row in range(3 * group, 3 * group + 3)]
    with pytest.raises(ConfigError, match=r"'train\.batch_size' is 20; expected a multiple of mesh data x fsdp = 8"):
        batch_rows(20, mesh)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1), (-1, 16, 1)])
def test_axes_that_do_not_multiply_to_the_devices(sizes):
    with pytest.raises(ConfigError, match=r"config field 'mesh' is .* must multiply to the 8 devices"):
        make_mesh(MeshConfig(*sizes))


def test_a_dimension_that_cannot_be_split_is_named():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    tree = {"decoder": {"blocks": {"mlp": {"down": {"kernel": np.zeros((2, 16, 12))}}}}}
    with pytest.raises(ConfigError, match=r"'mesh\.fsdp' is 8, .*decoder/blocks/mlp/down/kernel.*\(2, 16, 12\)"):
        place(tree, mesh)
