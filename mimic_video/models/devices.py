"""How arrays are spread over the device mesh in context (`jax.set_mesh`); without one, everything here does nothing.

A mesh has the axes `data` and `fsdp`, which divide batches, and `sequence`, which divides the video tokens of every sample.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)  # of arrays whose first axis is the batch
TOKENS = PartitionSpec(BATCH_AXES, None, "sequence")  # of video tokens (b, t, n, …): every device has a part of each frame


def axis_size(*names: str) -> int:
    """Devices along an axis of the mesh in context, or along several together; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in names)


def is_spread() -> bool:
    """Whether there is a mesh of more than one device."""
    return axis_size(*BATCH_AXES, "sequence") > 1


Capability = tuple[int, int]  # CUDA's compute capability: (9, 0) of an H100
PAPER = "paper"  # a platform to assume, of endless memory and no kernels: what is traced there has the products that are needed

_ASSUMED: contextvars.ContextVar[tuple[str, Capability | None] | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def assuming(platform: str, capability: Capability | None = None) -> Iterator[None]:
    """Within it, functions that have not been traced before are traced for another platform, whose devices need not be here."""
    token = _ASSUMED.set((platform, capability))
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': that of the mesh in context, which may be of devices that are not here, or JAX's default."""
    if assumed := _ASSUMED.get():
        return assumed[0]
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_capability() -> Capability | None:
    """The compute capability of this process's GPUs; None if that is not known, and for GPUs that have none."""
    assumed = _ASSUMED.get()
    return assumed[1] if assumed else _own_capability()


@functools.cache
def _own_capability() -> Capability | None:
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    major, minor = map(int, device.compute_capability.split("."))
    return major, minor


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x`, spread as `spec` says; dimensions need not be divisible."""
    return jax.lax.with_sharding_constraint(x, spec) if is_spread() else x
