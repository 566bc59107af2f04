"""Where things that can be made again are kept on a user's machine."""

import os
import pathlib

import jax


def user_cache(what: str) -> pathlib.Path:
    """The folder under `~/.cache`, or the environment's XDG_CACHE_HOME, for `what`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mimic_video" / what


def keep_compiled_programs() -> None:
    """Lets later processes find the programs that this one compiles: in JAX_COMPILATION_CACHE_DIR, or in the user's cache.

    To be called before anything is compiled. JAX keeps what took a second or more to compile.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))
