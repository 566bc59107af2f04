"""Where arrays live: the device mesh, and first-match rules from parameter paths to partitions."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mimic_video.compiler import compiler_options
from mimic_video.config import ConfigError, MeshConfig
from mimic_video.models.devices import BATCH
from mimic_video.parallel.distributed import wait_for_all
from mimic_video.trees import path_name

Tree = TypeVar("Tree")

# (regex over the path, partition); the first match wins. Block parameters have a leading depth axis. Of paths that none
# matches, those of `_LARGE` elements are split along their longest dimension, and smaller ones are copied.
RULES = (
    (r"lora/.*blocks/.*/a$", PartitionSpec(None, "fsdp", None)),
    (r"lora/.*blocks/.*/b$", PartitionSpec(None, None, "fsdp")),
    (r"lora/", PartitionSpec()),
    (r"blocks/.*(out_proj|mlp/down)/kernel", PartitionSpec(None, None, "fsdp")),
    (r"blocks/.*(q_proj|k_proj|v_proj|mlp/up|modulation/down)/kernel", PartitionSpec(None, "fsdp", None)),
    (r"blocks/.*modulation/up/kernel", PartitionSpec(None, None, "fsdp")),
    (r"(time_in|time_out|(action|video)_(proj|rank)|shared_proj)/kernel", PartitionSpec("fsdp", None)),
    (r"tokenizer/", PartitionSpec()),  # frozen, and small beside what it codes
)
_LARGE = 2**20


def axis_sizes(config: MeshConfig, devices: int, slices: int = 1) -> tuple[int, int, int]:
    """data, fsdp and sequence of a mesh over that many devices in that many TPU slices.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices, or do not fit the slices.
    """
    sizes = [config.data, config.fsdp, config.sequence]
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if math.prod(sizes) != devices:
        raise ConfigError(f"config field 'mesh' is {config}; its axes must multiply to the {devices} devices there are")
    data, fsdp, sequence = sizes
    if data % slices:
        raise ConfigError(f"config field 'mesh.data' is {data}; expected a multiple of the {slices} TPU slices")
    return data, fsdp, sequence


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh(data, fsdp, sequence) over all devices, on TPU along the links between chips: `sequence` has the nearest ones.

    Several TPU slices, between which there is only the data centre's network, are joined along `data`, so that every group of
    fsdp x sequence devices lies within one slice.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    data, *within = sizes = axis_sizes(config, len(devices), slices)
    if slices > 1:
        array = create_hybrid_device_mesh((data // slices, *within), (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        array = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, ("data", "fsdp", "sequence"), axis_types=(AxisType.Auto,) * 3)


@dataclasses.dataclass(frozen=True)
class MeshFunction:
    """A jitted function that runs, is traced or lowered with its mesh in context, which tells networks how they are spread.

    On a mesh of several processes, all compile it before its first call. Programs that run together wait for each other in
    collective operations, for 30 s on CPU, and compiling may take longer than that: after a restart process 0, which alone writes
    JAX's cache, may find there what the others compile again.
    """

    function: Any
    mesh: Mesh
    _called: list[bool] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, *arguments: Any) -> Any:
        with jax.set_mesh(self.mesh):
            if self.mesh.is_multi_process and not self._called:
                self.function.lower(*arguments).compile()
                wait_for_all("compile")
                self._called.append(True)
            return self.function(*arguments)

    def trace(self, *arguments: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function.trace(*arguments)

    def lower(self, *arguments: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function.lower(*arguments)


def on_mesh(function: Callable, mesh: Mesh, once: bool = False, **arguments: Any) -> MeshFunction:
    """`jax.jit(function, **arguments)` with a mesh, and the options of `compiler_options`."""
    return MeshFunction(
        jax.jit(function, compiler_options=compiler_options(mesh.devices.flat[0].platform, once), **arguments), mesh
    )


def require_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError unless a batch can be split over the data and fsdp axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ConfigError(f"config field 'train.batch_size' is {batch_size}; expected a multiple of mesh data x fsdp = {parts}")


def batch_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Rows of a global batch that this process loads: those of its devices, ascending.

    Meshes follow the links between chips, so the rows need not be neighbours. Processes among which `sequence` divides samples
    have the same rows.

    Raises:
        ConfigError: if the batch cannot be split over the mesh.
    """
    require_divisible(batch_size, mesh)
    size = batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return [row for part in _own_parts(mesh) for row in range(part * size, (part + 1) * size)]


def _own_parts(mesh: Mesh) -> list[int]:
    """Positions along data x fsdp that this process has devices at, ascending."""
    groups = mesh.devices.reshape(-1, mesh.shape["sequence"])
    here = jax.process_index()
    return [part for part, group in enumerate(groups) if any(device.process_index == here for device in group)]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of parameters, or of optimizer state that mirrors one.

    Raises:
        ConfigError: if a dimension is not divisible by the mesh axis that a rule splits it over.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
        spec = _longest_dimension(leaf, mesh) if rule is None else rule
        for dimension, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and dimension % mesh.shape[axis]:
                raise ConfigError(
                    f"config field 'mesh.{axis}' is {mesh.shape[axis]}, which does not divide a dimension of {name} {leaf.shape}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def _longest_dimension(leaf: Any, mesh: Mesh) -> PartitionSpec:
    """The partition of an array that no rule names: along its longest dimension that can be split, if it is large."""
    fitting = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
    if math.prod(leaf.shape) < _LARGE or not fitting:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*["fsdp" if axis == longest else None for axis in range(leaf.ndim)])


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts parameters or state where the sharding rules want them; what processes hold by themselves is the same in all."""

    def one(leaf: Any, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, where)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, where, lambda index: values[index])

    return jax.tree.map(one, tree, shardings(tree, mesh))


def global_batch(batch: Tree, mesh: Mesh) -> Tree:
    """A tree of this process's `batch_rows` of arrays → global arrays split over the data and fsdp axes."""
    sharding, parts = NamedSharding(mesh, BATCH), _own_parts(mesh)

    def whole(rows: np.ndarray) -> jax.Array:
        pieces = dict(zip(parts, np.split(rows, len(parts)), strict=True))
        size = len(rows) // len(parts)
        shape = (size * mesh.shape["data"] * mesh.shape["fsdp"], *rows.shape[1:])

        def piece(index: Any) -> np.ndarray:
            return pieces[(index[0].start or 0) // size]

        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(whole, batch)
