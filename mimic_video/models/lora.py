"""Low-rank adaptation: adapters are a tree of their own beside the network, which does not know of them (SPEC 4.3).

Where a frozen kernel W (in, out) is adapted, the adapters hold {"a": (in, r), "b": (r, out)}, behind the same depth axis if it
has one; `join_network` makes W + alpha/r · a·b of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mimic_video.config import ConfigError, LoraConfig

Tree = dict[str, Any]
Path = tuple[Any, ...]


def has_name(path: str, names: tuple[str, ...]) -> bool:
    """Whether one of `lora.targets` or `lora.trained` names a parameter: stands between slashes of its path."""
    return any(f"/{name}/" in f"/{path}/" for name in names)


def require_names(params: Tree, config: LoraConfig) -> None:
    """Checks the names of a configuration against the parameters of all networks.

    Raises:
        ConfigError: if a name of `lora.targets` or `lora.trained` is that of no parameter, or both name the same one.
    """
    paths = list(flatten_dict(params))
    for field in ("targets", "trained"):
        for name in getattr(config, field):
            if not any(has_name(_text(path), (name,)) for path in paths):
                raise ConfigError(
                    f"config field 'lora.{field}' has {name!r}, which names no parameter; there are, for example, "
                    + ", ".join(map(_text, paths[:8]))
                )
    if both := [_text(path) for path in paths if _is_target(path, config) and has_name(_text(path), config.trained)]:
        raise ConfigError(f"config fields 'lora.targets' and 'lora.trained' both name {', '.join(both)}")


def split_network(network: Tree, config: LoraConfig) -> tuple[Tree, Tree]:
    """(what is trained fully, what is frozen) of a network's parameters."""
    flat = flatten_dict(network)
    trained = {path: leaf for path, leaf in flat.items() if has_name(_text(path), config.trained)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def init_adapters(frozen: Tree, config: LoraConfig, key: jax.Array) -> Tree:
    """Adapters of a network's frozen parameters that change nothing yet: `a` is uniform within ±1/√in, `b` is zero."""
    targets = {path: leaf.shape for path, leaf in flatten_dict(frozen).items() if _is_target(path, config)}
    adapters = {}
    keys = jax.random.split(key, len(targets))
    for (path, (*depth, inputs, outputs)), own_key in zip(targets.items(), keys, strict=True):
        bound = inputs**-0.5
        adapters[*path, "a"] = jax.random.uniform(own_key, (*depth, inputs, config.rank), minval=-bound, maxval=bound)
        adapters[*path, "b"] = jnp.zeros((*depth, config.rank, outputs))
    return unflatten_dict(adapters)


@jax.named_scope("adapters")
def join_network(trained: Tree, frozen: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """The network, with the adapters merged into the frozen kernels, which keep their dtype."""
    network, flat = flatten_dict(frozen) | flatten_dict(trained), flatten_dict(adapters)
    for path in (path[:-1] for path in flat if path[-1] == "a"):
        kernel = network[path]
        change = config.alpha / config.rank * jnp.matmul(flat[*path, "a"], flat[*path, "b"])
        network[path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return unflatten_dict(network)


def _is_target(path: Path, config: LoraConfig) -> bool:
    return path[-1] == "kernel" and has_name(_text(path), config.targets)


def _text(path: Path) -> str:
    return "/".join(map(str, path))
