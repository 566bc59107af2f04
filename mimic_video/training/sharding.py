"""Where arrays live: the device mesh, and first-match rules from parameter paths to partitions."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.models.parallel import BATCH

# (regex over the '/'-joined path, partition); the first match wins. Block parameters have a leading depth axis.
RULES = (
    (r"lora/.*blocks/.*/a$", PartitionSpec(None, "fsdp", None)),
    (r"lora/.*blocks/.*/b$", PartitionSpec(None, None, "fsdp")),
    (r"lora/", PartitionSpec()),
    (r"blocks/.*(out_proj|mlp/down)/kernel", PartitionSpec(None, None, "fsdp")),
    (r"blocks/.*(q_proj|k_proj|v_proj|mlp/up|modulation/down)/kernel", PartitionSpec(None, "fsdp", None)),
    (r"blocks/.*modulation/up/kernel", PartitionSpec(None, None, "fsdp")),
    (r"(time_in|time_out|(action|video)_(proj|rank)|shared_proj)/kernel", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh(data, fsdp, sequence) over all devices.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.sequence]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"config field 'mesh' is {config}; its axes must multiply to the {len(devices)} devices there are")
    return jax.make_mesh(sizes, ("data", "fsdp", "sequence"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def require_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError unless a batch can be split over the data and fsdp axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ConfigError(f"config field 'train.batch_size' is {batch_size}; expected a multiple of mesh data x fsdp = {parts}")


def path_name(path: tuple[Any, ...]) -> str:
    """'backbone/blocks/mlp/up/kernel' from a JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of parameters, or of optimizer state that mirrors one.

    Raises:
        ConfigError: if a dimension is not divisible by the mesh axis that a rule splits it over.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        for dimension, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and dimension % mesh.shape[axis]:
                raise ConfigError(f"config field 'mesh.{axis}' is {mesh.shape[axis]}, which does not divide a dimension of "
                                  f"{name} {leaf.shape}")  # fmt: skip
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch → global arrays split over the data and fsdp axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
