"""What jaxtyping's import hook checks functions with: the shapes and dtypes in their annotations, and nothing else of them."""

import collections.abc
import functools
import operator
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

import beartype
import jax
import jaxtyping


def checked(stand_in: Callable) -> Callable:
    """Checks what a function was given and what it returned, once it has: what it refuses itself, it says better.

    jaxtyping asks for two stand-ins of every function: of its arguments, which returns Any, and of them and what came of them.
    """
    if stand_in.__annotations__.get("return", Any) is Any:
        return stand_in
    stand_in.__annotations__ = {name: _shapes(hint) for name, hint in stand_in.__annotations__.items()}
    return beartype.beartype(stand_in)


def _shapes(hint: Any) -> Any:
    """A hint that has shapes in it, else Any. In place of JAX's arrays there may be what JAX takes for them: NumPy's, numbers."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[jax.typing.ArrayLike, hint.dim_str] if hint.array_type is jax.Array else hint
    origin, whole = get_origin(hint), get_args(hint)
    parts = tuple(map(_shapes, whole))
    if origin is collections.abc.Callable or all(part is Any for part in parts):
        return Any
    parts = tuple(own if part is Any else part for part, own in zip(parts, whole, strict=True))
    return functools.reduce(operator.or_, parts) if origin in (Union, types.UnionType) else origin[parts]
