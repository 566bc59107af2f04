"""Trees of arrays on disk, each an orbax item with the fingerprints of its leaves."""

import difflib
import math
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mimic_video.parallel.distributed import agree
from mimic_video.runs.fingerprints import fingerprints
from mimic_video.runs.storage import RunError, absolute
from mimic_video.trees import named_leaves

_GROUP_BYTES = 2**30  # of this process that are read, verified and converted at a time
# What reading a damaged file raises. Not errors of the machine, such as missing permission, memory or network.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, EOFError, FileNotFoundError, NotADirectoryError)
_OF_THE_MACHINE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class DamagedError(RunError):
    """Arrays on disk that cannot be read, or are not those that were written."""


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """For trees of billions of parameters: by default, copies of all of them are in memory before the first is written."""
    return ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, restore_concurrent_gb=1)


def tree_args(tree: Any) -> ocp.args.PyTreeSave:
    """What to save a tree with: its fingerprints, and pieces of 64 MiB, each compressed, written and let go by itself."""
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=64 * 2**20), tree)
    return ocp.args.PyTreeSave(tree, save_args=pieces, custom_metadata={"fingerprints": fingerprints(tree)})


def load_tree(path: epath.Path, target: Any, stored_dtype: bool = False) -> Any:
    """Reads a tree, or a part of one, straight into the shardings of `target`, and verifies its fingerprints.

    No process holds more than its own shards and twice `_GROUP_BYTES`. All processes have to call this.

    Args:
        target: arrays or ShapeDtypeStructs with shardings; leaves are converted to their dtype, unless `stored_dtype`.

    Raises:
        DamagedError: the same on all processes, if any of them cannot read its part, or a fingerprint differs.
        RunError: if the arrays on disk are not of the target's names and shapes.
    """
    start, before = time.perf_counter(), _peak_gigabytes()
    stored, expected = _read_metadata(path)
    named = list(named_leaves(target).items())
    _require_shapes(path, dict(named), stored)
    structure, read = jax.tree.structure(target), list[jax.Array]()
    for group in _groups([_local_bytes(leaf, stored[name].dtype) for name, leaf in named]):
        wanted = [ocp.PLACEHOLDER] * len(named)
        for index in group:
            name, leaf = named[index]
            wanted[index] = jax.ShapeDtypeStruct(leaf.shape, stored[name].dtype, sharding=leaf.sharding)
        leaves = jax.tree.leaves(_read(path, jax.tree.unflatten(structure, wanted)))
        arrays = {named[index][0]: leaves[index] for index in group}
        del leaves  # each goes when it has been converted
        if expected is not None:
            found = fingerprints(tuple(arrays.values()))
            wrong = [name for name, value in zip(arrays, found.values(), strict=True) if expected.get(name) != value]
            if wrong:
                raise DamagedError(f"{path} is damaged: the fingerprints of {_some(wrong)} are not those that were written")
        for index in group:
            name, leaf = named[index]
            array = arrays.pop(name)
            read.append(array if stored_dtype else array.astype(leaf.dtype))
    size = sum(leaf.nbytes for leaf in read) / 1e9
    logging.info(
        "%s: %.2f GB in %.1f s; the peak of this process's memory rose by %.2f GB",
        path,
        size,
        time.perf_counter() - start,
        _peak_gigabytes() - before,
    )
    return jax.tree.unflatten(structure, read)


def _read_metadata(path: epath.Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, int] | None]:
    """Shapes, and fingerprints if the tree was written with them."""
    problem = None
    try:
        metadata = tree_handler().metadata(absolute(path))
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named_leaves(metadata.tree).items()}
        expected = (metadata.custom_metadata or {}).get("fingerprints")
    except Exception as error:
        problem = _reason(error)
    problem = agree(problem)
    if problem is not None:
        raise DamagedError(f"{path} is damaged: {problem}")
    if expected is None:
        logging.warning("%s was written without fingerprints, so damage would not be noticed", path)
    return shapes, expected


def _read(path: epath.Path, target: Any) -> Any:
    problem, read = None, None
    arguments = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:  # without an orbax Checkpointer, whose barriers would keep the others waiting for a process that fails
        read = tree_handler().restore(absolute(path), args=arguments)
    except Exception as error:
        problem = _reason(error)
    problem = agree(problem)
    if problem is not None:
        raise DamagedError(f"{path} is damaged: {problem}")
    return read


def _reason(error: Exception) -> str:
    """One line of what reading raised. Raises it again if it is no sign of damage."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # orbax puts it into an Exception with pages of details
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    if not isinstance(cause, _UNREADABLE) or any(word in text for word in _OF_THE_MACHINE):
        raise error
    return f"{type(cause).__name__}: {text[:400]}"


def _require_shapes(path: epath.Path, wanted: dict[str, Any], stored: dict[str, jax.ShapeDtypeStruct]) -> None:
    misfits = [
        f"{name} has shape {stored[name].shape} there, {leaf.shape} here"
        for name, leaf in wanted.items()
        if name in stored and stored[name].shape != leaf.shape
    ]
    misfits += [f"{name} is not there{nearest(name, stored)}" for name in wanted if name not in stored]
    if misfits:
        raise RunError(f"{path} holds arrays of another model: {_some(misfits)}")


def nearest(name: str, names: Any) -> str:
    """'; the nearest is X', if one is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (the nearest is {found[0]})" if found else ""


def _local_bytes(leaf: Any, dtype: Any) -> int:
    """What this process's devices hold of an array, in that dtype."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * dtype.itemsize * len(leaf.sharding.addressable_devices)


def _groups(sizes: list[int]) -> Iterator[list[int]]:
    """Runs of indices whose sizes are at most `_GROUP_BYTES` together, or one that is more."""
    group, total = list[int](), 0
    for index, size in enumerate(sizes):
        if group and total + size > _GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(index)
        total += size
    if group:
        yield group


def _some(parts: list[str]) -> str:
    return "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")


def _peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
