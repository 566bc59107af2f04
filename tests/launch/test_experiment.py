"""What every launch script does before its own work."""

import os
import pathlib
import subprocess
import sys

import pytest
import tiny

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
