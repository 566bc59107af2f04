"""How every launch script starts and ends: its flags, --help and --show_config, what is logged, where compiled programs are kept.

Names of flags are those of docs/commands.md in every script.
"""

import contextlib
import errno
import io
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mimic_video.config import (
    ConfigError,
    ExperimentConfig,
    describe,
    expanded_path,
    experiment_from,
    field_paths,
    unknown_field_message,
    value_at,
)

# Flags that are paths, in every script that has them; of --policy_run its own parser takes care.
_PATHS = ("expert_run", "input", "out", "policy", "prompts", "register", "robot", "run", "source", "video_run", "workdir")

# Of a file system that may not be written, is full or has another thing at a path; the message names the file.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG)

flags.disclaim_key_flags()  # flags that are defined here belong to the script that runs: its --help shows them


class SizeParser(flags.ArgumentParser):
    """'480x640' → (height, width)."""

    syntactic_help = "HEIGHTxWIDTH in pixels"

    def parse(self, argument: str | tuple[int, int]) -> tuple[int, int]:
        if isinstance(argument, tuple):
            return argument
        height, _, width = argument.partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise ValueError("expected HEIGHTxWIDTH in pixels, such as 480x640")
        return int(height), int(width)


class _SizeSerializer(flags.ArgumentSerializer):
    def serialize(self, value: tuple[int, int]) -> str:
        return "x".join(map(str, value))


def define_size(name: str, default: tuple[int, int] | None, help: str) -> flags.FlagHolder[Any]:
    """A flag whose value is (height, width)."""
    return flags.DEFINE(SizeParser(), name, default, help, serializer=_SizeSerializer())


def define_format() -> flags.FlagHolder[Any]:
    """The flag of commands that write a dataset."""
    return flags.DEFINE_enum("format", "tfrecord", ["tfrecord", "array_record"], "File format of the dataset")


def run(
    main: Callable[..., None],
    expected_errors: tuple[type[Exception], ...] = (),
    inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    *,
    config: bool | None = True,
    compilation_cache: bool | None = True,
) -> None:
    """Parses the command line and calls `main`, inside of a context.

    A mistake of the user's, that is a ConfigError or one of `expected_errors`, ends the script with its message and exit
    code 1, and so does a file system that refuses or is full; anything else keeps its traceback.

    Args:
        config: whether the script has --config, and `main` is called with the experiment; None if it may be left out, and `main`
            is called with None.
        compilation_cache: whether compiled programs are kept if the flag does not say so; None for a script that compiles none.
    """
    mistakes: tuple[type[Exception], ...] = (ConfigError, *expected_errors)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: what is printed may be more than a locale has
    if config is not False:
        _define_config(flags.FLAGS)
        flags.DEFINE_bool(
            "show_config", False, "Print every field of the configuration with its value, default and comment; then end"
        )
        sys.argv[1:] = _checked_config(sys.argv[1:])
        if any(argument.lstrip("-") in ("show_config", "show_config=true") for argument in sys.argv[1:]):
            sys.exit(_show_config())
        if config:
            flags.mark_flag_as_required("config")
    if compilation_cache is not None:
        flags.DEFINE_bool(
            "compilation_cache", compilation_cache, "Keep compiled programs in JAX_COMPILATION_CACHE_DIR, or the user's cache"
        )
    logging.set_verbosity(logging.WARNING)  # orbax, JAX and websockets narrate

    def start(arguments: list[str]) -> None:
        if arguments[1:]:
            sys.exit(f"error: '{arguments[1]}' is no flag; expected --NAME=VALUE, as --help shows")
        if compilation_cache is not None:
            _prepare_jax()
        with contextlib.ExitStack() as stack:
            try:
                _expand_paths(flags.FLAGS)
                stack.enter_context(inside())
                main(*([] if config is False else [_experiment(flags.FLAGS.config)]))
            except mistakes as error:
                sys.exit(f"error: {error}")
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                sys.exit(f"error: {error}")
            except (RuntimeError, AssertionError) as error:
                if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
                    raise
                reason = " ".join(str(error).split()) or "none of them is here"
                sys.exit(f"error: JAX does not start with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}")

    app.run(start)


def _experiment(config: ConfigDict | None) -> ExperimentConfig | None:
    return None if config is None else experiment_from(config.to_dict())


def _expand_paths(values: flags.FlagValues) -> None:
    """Puts home directories into flags that are paths."""
    for name in set(_PATHS) & set(values):
        flag = values[name]
        if isinstance(flag.value, list):
            flag.value = [expanded_path(path, f"--{name}") for path in flag.value]
        elif isinstance(flag.value, str):
            flag.value = expanded_path(flag.value, f"--{name}")


def _define_config(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment, FILE.py[:ARG], such as configs/quickstart.py:action. --config.FIELD=VALUE sets one of its fields, which "
        "--show_config lists and mimic_video/config.py describes",
        flag_values=values,
    )


def config_arguments(arguments: list[str]) -> list[str]:
    """What of a command line, without the script's name, gives the experiment: --config=FILE and --config.FIELD=VALUE."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if re.match(r"--?(no)?config[=.]", argument):
            alone = "=" in argument or following.startswith("-")  # --config.FIELD VALUE is two of them, a boolean one
            found.append(argument if alone else f"{argument}={following}")
    return found


def _checked_config(arguments: list[str]) -> list[str]:
    """The arguments with --config's home directory; ends the script for a file that is missing, or a field that there is not."""
    known = field_paths(ExperimentConfig)
    for index, argument in enumerate(arguments):
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config":
            if not given and arguments[index + 1 :]:  # --config FILE
                value = arguments.pop(index + 1)
            value = os.path.expanduser(value)
            arguments[index] = f"--config={value}"
            file = pathlib.Path(value.split(":")[0])
            if not file.is_file():
                sys.exit(f"error: --config: there is no file {file}")
            sys.path.append(str(file.parent.resolve()))  # for what an experiment imports that stands beside it
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            sys.exit(f"error: {unknown_field_message(name.removeprefix('config.'), known)}")
    return arguments


def _show_config() -> str | None:
    """Prints the configuration; the other flags of the script need not be given. Returns the message of an error."""
    values = flags.FlagValues()
    _define_config(values)
    values(sys.argv, known_only=True)
    if values.config is None:
        return "error: --show_config needs --config, the experiment to show"
    try:
        print(config_table(experiment_from(values.config.to_dict())))
    except ConfigError as error:
        return f"error: {error}"
    return None


def config_table(config: ExperimentConfig) -> str:
    """A line for each field: its name, value, default and comment."""
    rows = [("field", "value", "default", "comment")]
    for field in describe(ExperimentConfig):
        rows.append((field.path, repr(value_at(config, field.path)), repr(field.default), field.help))
    widths = [max(len(row[0]) for row in rows), 24, 16, 0]  # a longer value moves what is behind it
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _prepare_jax() -> None:
    import jax  # only here: evaluate_served.py runs where there is none

    from mimic_video.cache import keep_compiled_programs
    from mimic_video.memory import keep_freed_memory

    keep_freed_memory(os.environ.get("JAX_PLATFORMS"))
    if flags.FLAGS.compilation_cache:
        keep_compiled_programs()
    else:
        jax.config.update("jax_enable_compilation_cache", False)
