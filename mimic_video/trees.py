"""Names of a tree's leaves: '/'-joined paths of parameters, dotted fields of nested mappings."""

from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """'backbone/blocks/mlp/up/kernel' from a JAX key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """{path name: leaf}, in the order of the tree's leaves."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flat(values: dict) -> dict[str, Any]:
    """{"a.b": leaf} of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda value: not isinstance(value, dict))
    return {path_name(path).replace("/", "."): leaf for path, leaf in leaves}
