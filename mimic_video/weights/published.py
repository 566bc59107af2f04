"""Parameter names and layouts of the published PyTorch networks ↔ our parameter trees (SPEC 1.4, 3.10, 6.3).

One machinery for every network and file format: a table `Names` says which of their tensors is which of our parameters.

    import_params(fuse_lora(without_prefix(open_tensors(path))), VIDEO_DIT_NAMES, shapes, source=path)
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mimic_video.trees import named_leaves, path_name

Tree = dict  # nested dict of arrays: the pure dict of a network's NNX state


class Place(NamedTuple):
    """Where one of their tensors stands in our tree.

    Their `ones` trailing axes of length 1 go first. Then, if `path` ends in '/kernel', their (out, in, *window) becomes our
    (*window, in, out); any other tensor keeps its axes.
    """

    path: str  # '/'-joined, list members by index
    ones: int = 0


Names = dict[str, Place]  # their name → place; `{i}` in a name counts the blocks that our tree stacks on a leading axis


class WeightsError(ValueError):
    """Weights that cannot be used: no checkpoint, a damaged one, or another network's."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, or computed, when `numpy.asarray` asks for it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


Tensors = Mapping[str, LazyTensor | np.ndarray]


def _attention_names(published: str, ours: str) -> Names:
    projections = {f"{published}.{part}_proj.weight": Place(f"{ours}/{part}_proj/kernel") for part in ("q", "k", "v")}
    norms = {f"{published}.{part}_norm.weight": Place(f"{ours}/{part}_norm/scale") for part in ("q", "k")}
    return projections | norms | {f"{published}.output_proj.weight": Place(f"{ours}/out_proj/kernel")}


def _modulation_names(published: str, ours: str) -> Names:
    return {f"{published}.1.weight": Place(f"{ours}/down/kernel"), f"{published}.2.weight": Place(f"{ours}/up/kernel")}


def _dense_names(published: str, ours: str) -> Names:
    return {f"{published}.weight": Place(f"{ours}/kernel"), f"{published}.bias": Place(f"{ours}/bias")}


def _transformer_names() -> Names:
    """What both transformers share: blocks and the final layer."""
    names = {
        "blocks.{i}.mlp.layer1.weight": Place("blocks/mlp/up/kernel"),
        "blocks.{i}.mlp.layer2.weight": Place("blocks/mlp/down/kernel"),
        "final_layer.linear.weight": Place("final_proj/kernel"),
    }
    for attention in ("self_attn", "cross_attn"):
        names |= _attention_names(f"blocks.{{i}}.{attention}", f"blocks/{attention}")
    for layer in ("self_attn", "cross_attn", "mlp"):
        names |= _modulation_names(f"blocks.{{i}}.adaln_modulation_{layer}", f"blocks/{layer}_modulation")
    return names | _modulation_names("final_layer.adaln_modulation", "final_modulation")


VIDEO_DIT_NAMES: Names = {
    "x_embedder.proj.1.weight": Place("patch_proj/kernel"),
    "t_embedder.1.linear_1.weight": Place("time_in/kernel"),
    "t_embedder.1.linear_2.weight": Place("time_out/kernel"),
    "t_embedding_norm.weight": Place("time_norm/scale"),
} | _transformer_names()

ACTION_DECODER_NAMES: Names = {
    "obs_mask_token": Place("proprio_mask_token"),
    "pos_embedding": Place("position_embedding"),
    "ctx_norm.weight": Place("context_norm/scale"),
    "ctx_norm.bias": Place("context_norm/bias"),
    "t_embedder.pair.A.weight": Place("time_embedding/shared_proj/kernel"),
    "t_embedding_norm.weight": Place("time_embedding/norm/scale"),
} | _transformer_names()
for _published, _ours in (("proj_x", "action_proj"), ("proj_c", "video_proj"), ("B", "action_rank"), ("C", "video_rank")):
    ACTION_DECODER_NAMES |= _dense_names(f"t_embedder.pair.{_published}", f"time_embedding/{_ours}")
for _published, _ours in (("obs_embedder", "proprio_embedder"), ("action_embedder", "action_embedder")):
    for _layer in range(8):  # as many as any width has; PyTorch's sequence holds an activation between dense layers
        ACTION_DECODER_NAMES |= _dense_names(f"{_published}.layers.{2 * _layer}", f"{_ours}/layers/{_layer}")

IGNORED = re.compile(r"accum_.*|pos_embedder\..*|(.*\.)?_extra_state")  # counters and buffers, no parameters


def without_prefix(tensors: Tensors, *, ema: bool = False, source: str = "the checkpoint") -> Tensors:
    """A checkpoint's tensors without `net.`, and without the moving average's copies; or only those copies, `net_ema.`.

    Raises:
        WeightsError: if there is no moving average but it is asked for, or a name is there both with and without its prefix.
    """
    average = {name.removeprefix("net_ema."): value for name, value in tensors.items() if name.startswith("net_ema.")}
    if ema:
        if not average:
            raise WeightsError(f"{source} holds no moving average: no name starts with 'net_ema.'")
        return average
    kept = [name for name in tensors if not name.startswith("net_ema.")]
    plain = {name.removeprefix("net."): tensors[name] for name in kept}
    if len(plain) < len(kept):
        twice = sorted(name for name in kept if f"net.{name}" in tensors)
        raise WeightsError(f"{source} holds tensors both with and without 'net.': {twice}")
    return plain


_BASE, _LORA_A, _LORA_B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def fuse_lora(tensors: Tensors, alpha: float = 32.0, *, source: str = "the checkpoint") -> Tensors:
    """Replaces each adapted layer's base weight W, A (r, in) and B (out, r) by W + (alpha/r)·B·A (SPEC 3.10, 4.3).

    As published, the product, its scaling and the sum are each rounded to the stored dtype. Other tensors stay as they are.

    Raises:
        WeightsError: listing every layer whose W, A and B are not all there, do not fit, or have different dtypes.
    """
    suffixes = (_BASE, _LORA_A, _LORA_B)
    layers = {name.removesuffix(suffix) for name in tensors for suffix in suffixes if name.endswith(suffix)}
    fused: dict[str, LazyTensor | np.ndarray] = {name: value for name, value in tensors.items() if not name.endswith(suffixes)}
    problems = []
    for layer in sorted(layers):
        missing = [layer + suffix for suffix in suffixes if layer + suffix not in tensors]
        if missing:
            problems.append(f"missing {missing}")
            continue
        base, a, b = (tensors[layer + suffix] for suffix in suffixes)
        if f"{layer}.weight" in fused:
            problems.append(f"'{layer}.weight' is there beside its parts")
        elif (*b.shape[:1], *a.shape) != (base.shape[0], b.shape[-1], base.shape[-1]):
            found = f"base {tuple(base.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
            problems.append(f"'{layer}' has {found}; expected (out, in), (r, in), (out, r)")
        elif not base.dtype == a.dtype == b.dtype:
            problems.append(f"'{layer}' has base {base.dtype}, A {a.dtype}, B {b.dtype}; expected one dtype")
        fused[f"{layer}.weight"] = LazyTensor(tuple(base.shape), base.dtype, functools.partial(_fused, base, a, b, alpha))
    if problems:
        raise WeightsError(f"LoRA weights of {source} cannot be fused in {len(problems)} layers:\n  " + "\n  ".join(problems))
    return fused


def _fused(base, a, b, alpha: float) -> np.ndarray:
    wide = np.float32 if base.dtype.itemsize < 4 else base.dtype  # NumPy has no matrix product of bfloat16
    product = (np.asarray(b).astype(wide) @ np.asarray(a).astype(wide)).astype(base.dtype)
    return np.asarray(base) + (product.astype(wide) * (alpha / a.shape[0])).astype(base.dtype)


def import_params(tensors: Tensors, names: Names, shapes: Tree, *, source: str = "the weights", dtype: Any = None) -> Tree:
    """Our parameters from their tensors.

    Args:
        tensors: by their name, without prefix; read one by one. Counters and buffers (SPEC 3.10) may be among them.
        names: their names; those of parameters that `shapes` does not have are not expected.
        shapes: the network's parameters as shapes: the tree of the result.
        source: where the tensors come from, for the error message.
        dtype: of the result; None to keep what is stored, bfloat16 included.

    Returns:
        NumPy arrays, blocks stacked on a leading axis.

    Raises:
        WeightsError: listing every missing, unexpected and misshapen tensor.
    """
    expected = published_shapes(names, shapes)
    problems = [f"missing '{name}' {struct.shape}" for name, struct in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if IGNORED.fullmatch(name):
            continue
        if name not in expected:
            problems.append(f"unexpected '{name}' {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name].shape:
            problems.append(f"'{name}' has shape {tuple(tensor.shape)}; expected {expected[name].shape}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"'{name}' holds {tensor.dtype}; expected floating point")
    if problems:
        raise WeightsError(f"{source} does not fit this network in {len(problems)} tensors:\n  " + "\n  ".join(problems))
    flat = named_leaves(shapes)
    values: dict[str, np.ndarray] = {}
    for name, place in names.items():
        if place.path not in flat:
            continue
        shape, stacked = flat[place.path].shape, "{i}" in name
        members = [tensors[name.format(i=i)] for i in range(shape[0] if stacked else 1)]
        stored = sorted({str(member.dtype) for member in members})
        if dtype is None and len(stored) > 1:
            raise WeightsError(f"{source}: blocks of '{name}' are stored as {' and '.join(stored)}; expected one dtype")
        values[place.path] = _aligned_empty(shape, np.dtype(dtype or members[0].dtype))
        for block, member in zip(values[place.path] if stacked else [values[place.path]], members, strict=True):
            block[...] = _to_ours(np.asarray(member), place)
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], shapes)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX on CPU takes over without a copy, since it starts at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def export_params(params: Tree, names: Names) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, contiguous array in their layout) of every parameter: the inverse of `import_params`.

    A parameter is let go once its last tensor is out, so that a caller who keeps no reference to `params` itself never holds
    the weights twice.
    """
    flat = named_leaves(params)
    _require_named(names, flat)
    del params
    for name, place in names.items():
        if place.path not in flat:
            continue
        leaf = np.asarray(flat.pop(place.path))
        if "{i}" not in name:
            yield name, np.ascontiguousarray(_to_theirs(leaf, place))
            continue
        for i, block in enumerate(leaf):
            yield name.format(i=i), np.ascontiguousarray(_to_theirs(block, place))


def published_shapes(names: Names, shapes: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Their name → their shape and our dtype, in the order of `export_params`, from a tree of our shapes (or arrays)."""
    flat = named_leaves(shapes)
    _require_named(names, flat)
    result: dict[str, jax.ShapeDtypeStruct] = {}
    for name, place in names.items():
        if place.path not in flat:
            continue
        leaf = flat[place.path]
        count, shape = (leaf.shape[0], leaf.shape[1:]) if "{i}" in name else (1, leaf.shape)
        if place.path.endswith("/kernel"):
            shape = (shape[-1], shape[-2], *shape[:-2])
        struct = jax.ShapeDtypeStruct((*shape, *(1,) * place.ones), leaf.dtype)
        result |= {name.format(i=i): struct for i in range(count)}
    return result


def _to_ours(tensor: np.ndarray, place: Place) -> np.ndarray:
    tensor = tensor.reshape(tensor.shape[: tensor.ndim - place.ones])
    return np.moveaxis(tensor, (1, 0), (-2, -1)) if place.path.endswith("/kernel") else tensor


def _to_theirs(leaf: np.ndarray, place: Place) -> np.ndarray:
    leaf = np.moveaxis(leaf, (-2, -1), (1, 0)) if place.path.endswith("/kernel") else leaf
    return leaf.reshape(*leaf.shape, *(1,) * place.ones)


def _require_named(names: Names, flat: Mapping[str, Any]) -> None:
    unnamed = sorted(set(flat) - {place.path for place in names.values()})
    if unnamed:
        raise ValueError(f"there are no published names for the parameters {unnamed}")
