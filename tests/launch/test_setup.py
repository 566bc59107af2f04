"""launch/setup.sh where `python3 -m venv` does not do."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
NO_VENV = (
    """case "$*" in "-m venv "*) mkdir -p "$3/bin"; echo "ensurepip is not available" >&2; exit 1;; esac"""  # as Debian's does
)
TOO_OLD = """case "$*" in "-c import sys; sys.exit(sys.version_info"*) exit 1;; "--version") echo "Python 3.10.12"; exit;; esac"""
NO_PIP = """case "$*" in "-m pip "*) exit 1;; esac"""


def usual_python():
    """The system's, if it would do: in Debian pip refuses to install anything for it ("externally-managed-environment")."""
    check = ["/usr/bin/python3", "-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"]
    found = pathlib.Path(check[0]).exists() and subprocess.run(check, capture_output=True).returncode == 0
    return check[0] if found else sys.executable


@pytest.fixture
def setup(tmp_path):
    """setup(what python3 does first, variables) → of launch/setup.sh in a copy: (exit code, output, the environment)."""
    copy, programs = tmp_path / "copy", tmp_path / "bin"
    for name in ("launch/setup.sh", "setup.py", "pyproject.toml", "README.md", "mimic_video/__init__.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    programs.mkdir()

    def run(*first, **variables):
        python = programs / "python3"
        python.write_text("\n".join(["#!/usr/bin/env bash", *first, f'exec {usual_python()} "$@"\n']))
        python.chmod(0o755)
        own = {"PATH": f"{programs}:/usr/bin:/bin", "PIP_NO_DEPS": "1", "UV_PYTHON_DOWNLOADS": "never"}
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV")}
        command = [str(copy / "launch" / "setup.sh"), "none", str(tmp_path / "venv")]
        done = subprocess.run(command, env=environment | own | variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, tmp_path / "venv"

    return run


@pytest.mark.parametrize(
    ("first", "said"), [(NO_VENV, "'python3 -m venv' fails: using uv"), (TOO_OLD, "Python 3.10.12 is too old: using uv")]
)
def test_uv_makes_the_environment_that_python3_cannot(setup, tmp_path, first, said):
    index = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", f"--dest={tmp_path / 'uv'}", "uv"]
    if subprocess.run(index, capture_output=True).returncode:
        pytest.skip("pip reaches no index that has uv")
    code, output, venv = setup(first, PIP_FIND_LINKS=f"{os.environ.get('PIP_FIND_LINKS', '')} {tmp_path / 'uv'}")
    assert code == 0 and said in output, output
    program = "import sys, mimic_video; print(sys.version_info >= (3, 11), sys.prefix, mimic_video.__version__)"
    python = [venv / "bin" / "python", "-c", program]
    printed = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert printed[:2] == ["True", str(venv)]
    assert "using uv" not in setup(first)[1]  # it is there


@pytest.mark.parametrize(
    ("first", "variables", "message"),
    [
        (
            [NO_VENV, NO_PIP],
            {},
            "error: 'python3 -m venv' fails, and there is neither uv nor pip to get it with; expected a Python",
        ),
        ([TOO_OLD, NO_PIP], {}, "error: Python 3.10.12 is too old, and there is neither uv nor pip"),
        ([TOO_OLD], {"PYTHON": "python3"}, "error: PYTHON is python3: Python 3.10.12 is too old; expected a Python of 3.11"),
        ([], {"PYTHON": "python9"}, "error: PYTHON is python9: there is no python9; expected a Python of 3.11 or newer"),
    ],
)
def test_what_is_missing_is_one_line(setup, first, variables, message):
    code, output, _ = setup(*first, **variables)
    assert code == 1 and output.startswith(message) and output.count("\n") == 1


def test_what_is_installed_is_compiled_where_python_may_not_keep_what_it_compiles(setup):
    code, output, venv = setup(PYTHONDONTWRITEBYTECODE="1")
    assert code == 0, output
    (finder,) = venv.glob("lib/*/site-packages/__editable__*finder.py")  # all that is installed besides pip
    assert any(finder.parent.glob(f"__pycache__/{finder.stem}.*.pyc"))
