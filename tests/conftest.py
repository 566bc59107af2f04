"""Tests run on CPU with eight simulated devices; the flag must be set before JAX starts."""

import collections
import os
import re

import jaxtyping
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's teams of threads spin, and stall everything on few cores
os.environ["no_proxy"] = "localhost,127.0.0.1"  # where servers of tests are
# Compiling dominates these tests, not running what was compiled.
fast_compile = ("xla_backend_optimization_level=0", "xla_llvm_disable_expensive_passes=true")
for flag in ("xla_force_host_platform_device_count=8", *fast_compile):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}"

STAGES = ("reference", "processes", "training", "simulator", "tpu_compiler", "full_size")  # what they are: pyproject.toml


def pytest_ignore_collect(collection_path, config):
    """Whether a module has no test of the stages asked for: what it imports need not be installed, and takes seconds."""
    if not (collection_path.name.startswith("test_") and config.option.markexpr):
        return None
    text, names = collection_path.read_text(), "|".join(STAGES)
    whole = re.findall(rf"^pytestmark = pytest\.mark\.({names})$", text, re.M)
    for stage in whole or ["", *re.findall(rf"pytest\.mark\.({names})\b", text)]:
        marks = collections.defaultdict(bool, {stage: True, "slow": bool(stage)})
        if eval(config.option.markexpr, {}, marks):  # such expressions are Python's
            return None
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(item.get_closest_marker(stage) for stage in STAGES):
            item.add_marker("slow")


def pytest_configure(config):
    """Keeps what is compiled for other workers, child processes and later runs, and has shapes checked where they are annotated.

    JAX tells entries of the cache apart by its version, its flags and the program; `pytest --cache-clear` removes them.
    """
    if config.pluginmanager.has_plugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("compiled")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    jaxtyping.install_import_hook(["mimic_video", "data_pipelines"], "shape_checks.checked")


@pytest.fixture
def one_device(monkeypatch):
    """Meshes of the first device alone, where spreading is not what is tested: nothing is cut into eight when it is saved."""
    import jax

    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is found in the user's cache, which another version may have written, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
