"""Where things that can be made again are kept on a user's machine."""

import os
import pathlib
import tempfile

import jax
from absl import logging

from mimic_video.errors import ConfigError


def user_cache(what: str) -> pathlib.Path:
    """The folder under `~/.cache`, or the environment's XDG_CACHE_HOME, for `what`. Raises ConfigError if there is no home."""
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mimic_video" / what
    except RuntimeError as error:  # in a container, of a user who has none
        raise ConfigError(f"{error}; expected it in HOME, or a folder for caches in XDG_CACHE_HOME") from error


def keep_compiled_programs() -> None:
    """Lets later processes find the programs that this one compiles: in JAX_COMPILATION_CACHE_DIR, or in the user's cache.

    To be called before anything is compiled. JAX keeps what took a second or more to compile. Where nothing can be written, a
    warning says so, and what is there already is found.
    """
    folder = named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        folder = str(user_cache("xla")) if named is None else os.path.expanduser(named)
        if folder != named:
            jax.config.update("jax_compilation_cache_dir", folder)
        if folder and "://" not in folder:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ConfigError) as error:
        logging.warning("compiled programs are not kept: %s; they can be in a folder that JAX_COMPILATION_CACHE_DIR names", error)
        jax.config.update("jax_enable_compilation_cache", folder is not None and os.path.isdir(folder))
