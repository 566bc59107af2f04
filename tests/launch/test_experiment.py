"""What every launch script does before its own work."""

import os
import pathlib
import subprocess
import sys

import pytest
import tiny
from absl import flags

ROOT = pathlib.Path(__file__).parents[2]
COMPILING = """
import experiment, jax
experiment.run(lambda config: print(jax.jit(lambda x: x + 1)(config.train.steps)))
"""


@pytest.mark.processes
def test_compiled_programs_are_kept_unless_switched_off(config_file, tmp_path):
    file = config_file(tiny.experiment())
    user, own, off = tmp_path / "user", tmp_path / "own", tmp_path / "off"
    starts = [  # cache home, environment, arguments
        (user, {}, []),
        (tmp_path / "unused", {"JAX_COMPILATION_CACHE_DIR": str(own)}, []),
        (off, {}, ["--nocompilation_cache"]),
    ]
    processes = []
    for home, variables, arguments in starts:
        inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment = (
            inherited
            | {
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}",
                "XDG_CACHE_HOME": str(home),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            | variables
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", COMPILING, f"--config={file}", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["5"] * 3
    assert list((user / "mimic_video" / "xla").iterdir()) and list(own.iterdir())
    assert not (tmp_path / "unused").exists() and not off.exists()


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import experiment

    return experiment


def test_sizes_are_height_and_width(experiment):
    values = flags.FlagValues()
    flags.DEFINE(experiment.SizeParser(), "image_size", (48, 64), "", values)
    values(["script"])
    assert values.image_size == (48, 64)
    values(["script", "--image_size=480x640"])
    assert values.image_size == (480, 640)
    for wrong in ("480", "480,640", "480x", "x640", "-480x640", "480x0", "480x640x3"):
        with pytest.raises(flags.IllegalFlagValueError, match=f"--image_size={wrong}: expected HEIGHTxWIDTH in pixels"):
            values(["script", f"--image_size={wrong}"])


SCRIPT = """
import errno, experiment

def main():
    raise {{
        "expected": RuntimeError("what is wrong"),
        "disk": OSError(errno.ENOSPC, "what is wrong", "/a/file"),
        "other": KeyError("what is wrong"),
        "system": OSError(errno.EPIPE, "what is wrong"),
    }}[{kind!r}]

experiment.run(main, (RuntimeError,), config=False, compilation_cache=None)
"""


@pytest.mark.parametrize("kind", ["expected", "disk", "other", "system"])
def test_a_mistake_is_a_line_and_anything_else_keeps_its_traceback(kind):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"}
    command = [sys.executable, "-c", SCRIPT.format(kind=kind)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    lines = {"expected": "error: what is wrong\n", "disk": "error: [Errno 28] what is wrong: '/a/file'\n"}
    if kind in lines:
        assert ended.stderr == lines[kind]
    else:
        assert "Traceback" in ended.stderr and {"other": "KeyError", "system": "BrokenPipeError"}[kind] in ended.stderr


@pytest.mark.parametrize("platform", ["cuda", "no_such_platform"])  # known to JAX, whose plugin is not there; and not known
def test_a_platform_that_is_not_there_is_named(platform):
    program = "import experiment, jax; experiment.run(lambda: print(jax.devices()), config=False, compilation_cache=None)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}", "JAX_PLATFORMS": platform}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    if ended.returncode == 0:
        pytest.skip("there is such a platform")
    assert ended.stderr.splitlines()[-1].startswith(f"error: JAX does not start with JAX_PLATFORMS={platform}: ")
    assert "Traceback" not in ended.stderr


def test_what_a_locale_lacks_is_printed_all_the_same():
    program = "import experiment; experiment.run(lambda: print('σ'), config=False, compilation_cache=None)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}", "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "\\u03c3\n"
