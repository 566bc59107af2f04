import jax
import jax.numpy as jnp
import pytest

from mimic_video import compiler
from mimic_video.config import MeshConfig
from mimic_video.parallel.sharding import make_mesh, on_mesh

LEVEL, EMITTERS = "xla_backend_optimization_level", "xla_cpu_use_fusion_emitters"


@pytest.mark.parametrize(
    ("platform", "flags", "once", "expected"),
    [
        ("cpu", "", False, {LEVEL: 1, EMITTERS: False}),
        ("cpu", "", True, {LEVEL: 0, EMITTERS: False}),
        ("cpu", f"--{LEVEL}=3", False, {EMITTERS: False}),
        ("cpu", f"--{EMITTERS}=true --{LEVEL}=0", True, {}),
        ("tpu", "", False, {}),
        ("gpu", "", True, {}),
    ],
)
def test_only_programs_for_cpu_are_compiled_otherwise_and_not_against_the_users_flags(
    platform, flags, once, expected, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(compiler, "_is_option", lambda name, value: True)
    assert compiler.compiler_options(platform, once) == expected


def test_options_that_this_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compiler._is_option(LEVEL, 1) and not compiler._is_option("xla_no_such_option", 1)
    with pytest.raises(Exception, match="xla_backend_optimization_level"):
        compiler._is_option(LEVEL, "high")  # a value that is wrong is not taken for a name that is unknown
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert on_mesh(lambda x: x + 1, mesh)(jnp.zeros(2)).tolist() == [1, 1]
