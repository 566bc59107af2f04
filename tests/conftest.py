"""Tests run on CPU with eight simulated devices; the flag must be set before JAX starts."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's teams of threads spin, and stall everything on few cores
# Compiling dominates these tests, not running what was compiled.
fast_compile = ("xla_backend_optimization_level=0", "xla_llvm_disable_expensive_passes=true")
for flag in ("xla_force_host_platform_device_count=8", *fast_compile):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is found in the user's cache, which another version may have written, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go_with_their_module():
    """Thousands of them would otherwise stay in memory until the last test."""
    yield
    import jax  # after the flags above

    jax.clear_caches()
