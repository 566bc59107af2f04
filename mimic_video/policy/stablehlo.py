"""A policy as StableHLO: a file that JAX can run without this package, after `pip install jax flatbuffers`.

    import jax, numpy as np
    program = jax.export.deserialize(bytearray(open("bundle/stablehlo/cuda.bin", "rb").read()))
    weights = jax.device_put(dict(np.load("bundle/stablehlo/weights.npz")))
    plan = jax.jit(program.call)
    actions = plan(weights, images, proprio, text, key)

takes uint8 images (b, v, f, h, w, 3) of the model's v cameras in their size, raw proprioception (b, p), rows of text features
(b, rows, width) as in `bundle/text`, and uint32 key data (2,), any two numbers, and gives actions (b, a, m) in raw units.
`stablehlo/signature.json` has these shapes; programs of earlier versions have no axis v, but one camera above the other in h.
Weights are an argument since programs with billions of constants cannot be written to a file.
"""

import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mimic_video.models.devices import platform as present_platform
from mimic_video.policy.policy import Policy
from mimic_video.runs.directory import write_json
from mimic_video.trees import named_leaves

Platform = Literal["cpu", "cuda", "tpu"]


def write_programs(folder: pathlib.Path, policies: dict[Platform, Policy], batch: int) -> None:
    """Writes `<platform>.bin` of every policy, and what they share: `weights.npz` and `signature.json`.

    Args:
        policies: the same policy for every platform, apart from its configuration (see `attention_for`).
    """
    folder.mkdir(parents=True)
    policy = next(iter(policies.values()))
    names = named_leaves(policy.params)
    weights = {name: np.asarray(_stored(leaf)) for name, leaf in names.items()}
    np.savez(folder / "weights.npz", allow_pickle=False, **weights)
    inputs = policy.program.input_shapes(batch)
    for platform, one in policies.items():
        (folder / f"{platform}.bin").write_bytes(export_program(one, platform, batch))
    shapes = {name: {"shape": list(struct.shape), "dtype": struct.dtype.name} for name, struct in inputs.items()}
    write_json(folder / "signature.json", {"inputs": shapes, "embodiment": policy.embodiment.name})


def export_program(policy: Policy, platform: Platform, batch: int) -> bytes:
    """The serialised program of (weights, images, proprio, text, key), for `batch` robots."""
    treedef, kept = jax.tree.structure(policy.params), named_leaves(policy.params)

    def call(weights: dict[str, Any], images: Any, proprio: Any, text: Any, key: Any) -> jax.Array:
        leaves = [_restored(weights[name], leaf.dtype) for name, leaf in kept.items()]
        return policy.program(jax.tree.unflatten(treedef, leaves), images, proprio, text, key)

    shapes = {name: jax.eval_shape(_stored, leaf) for name, leaf in kept.items()}
    exported = jax.export.export(jax.jit(call), platforms=[platform])(shapes, *policy.program.input_shapes(batch).values())
    return bytes(exported.serialize())


def attention_for(platform: Platform) -> Literal["auto", "xla"]:
    """The implementation of attention that a program for `platform` can have: the fastest only where this process runs on it."""
    here = {"gpu": "cuda"}.get(present_platform(), present_platform())
    return "auto" if platform == here else "xla"


def _stored(leaf: jax.Array) -> jax.Array:
    """NumPy's files have no bfloat16: its bits stand for it."""
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16) if leaf.dtype == jnp.bfloat16 else leaf


def _restored(leaf: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, dtype) if leaf.dtype != dtype else leaf
