"""How arrays are spread over the device mesh in context (`jax.set_mesh`); without one, everything here does nothing.

A mesh has the axes `data` and `fsdp`, which divide batches, and `sequence`, which divides the video tokens of every sample.
"""

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)  # of arrays whose first axis is the batch
TOKENS = PartitionSpec(BATCH_AXES, None, "sequence")  # of video tokens (b, t, n, …): every device has a part of each frame


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh in context; 1 without it."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def is_spread() -> bool:
    """Whether there is a mesh of more than one device."""
    return any(axis_size(name) > 1 for name in (*BATCH_AXES, "sequence"))


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': that of the mesh in context, which may be of devices that are not here, or JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x`, spread as `spec` says; dimensions need not be divisible."""
    return jax.lax.with_sharding_constraint(x, spec) if is_spread() else x
