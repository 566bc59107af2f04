"""How XLA is asked to compile programs for CPUs."""

import functools
import os

import jax


def compiler_options(platform: str, once: bool = False) -> dict[str, bool | int]:
    """XLA's options for a platform, which `jax.jit` takes: its defaults, but on CPU.

    There programs of small networks are compiled in two thirds of the time, and steps are as fast or faster, with less
    optimisation and without its newer fusions (docs/benchmarks.md). What the environment variable XLA_FLAGS names stays as it
    says.

    Args:
        once: the program runs once, and compiling it is what takes time.
    """
    if platform != "cpu":
        return {}
    options: dict[str, bool | int] = {"xla_backend_optimization_level": 0 if once else 1, "xla_cpu_use_fusion_emitters": False}
    chosen = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in chosen and _is_option(name, value)}


@functools.cache
def _is_option(name: str, value: bool | int) -> bool:
    """Whether this version of XLA has an option, which come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
