"""The `--config=FILE.py[:ARG] [--config.FIELD=VALUE ...]` of every launch script."""

import contextlib
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mimic_video.cache import keep_compiled_programs
from mimic_video.config import ConfigError, ExperimentConfig, experiment_from, field_paths, unknown_field_message

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. configs/quickstart.py:action")
_CACHE = flags.DEFINE_bool("compilation_cache", True, "Keep compiled programs in JAX_COMPILATION_CACHE_DIR, or the user's cache")


def run(
    main: Callable[[ExperimentConfig], None],
    expected_errors: tuple[type[Exception], ...] = (),
    inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Parses the command line and calls `main` with the experiment, inside of a context.

    A mistake of the user's, that is a ConfigError or one of `expected_errors`, ends the script with its message and exit
    code 1; anything else keeps its traceback.
    """
    mistakes: tuple[type[Exception], ...] = (ConfigError, *expected_errors)
    known = field_paths(ExperimentConfig)
    for argument in sys.argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            file = pathlib.Path(value.split(":")[0])
            if not file.is_file():
                sys.exit(f"error: --config: there is no file {file}")
            sys.path.append(str(file.parent.resolve()))  # for what an experiment imports that stands beside it
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            sys.exit(f"error: {unknown_field_message(name.removeprefix('config.'), known)}")
    flags.mark_flag_as_required("config")
    logging.set_verbosity(logging.WARNING)  # orbax and JAX narrate

    def start(_: list[str]) -> None:
        if not _CACHE.value:
            jax.config.update("jax_enable_compilation_cache", False)
        else:
            keep_compiled_programs()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(inside())
                main(experiment_from(_CONFIG.value.to_dict()))
            except mistakes as error:
                sys.exit(f"error: {error}")

    app.run(start)
