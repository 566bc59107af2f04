"""Every command of README, CONTRIBUTING and docs, up to where its work would begin.

A script is run until it has its flags and its experiment: flags and values have to be known, files of experiments to be there,
and fields to make an experiment that is valid. What else commands name is looked up: extras, stages and paths of tests, flags of
the robot loop. Blocks of bash with a program that no check knows have to say what they need: tests/documented.py.
"""

import ast
import contextlib
import importlib
import io
import itertools
import os
import re
import runpy
import sys
import tomllib
import types
from collections.abc import Callable, Mapping
from unittest import mock

import pytest
import setuptools
from absl import app, flags
from documented import DOCUMENTS, ROOT, blocks, inline_commands, programs, stand_ins

from mimic_video.config import ConfigError, experiment_from
from mimic_video_client.robot_loop import make_parser

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections

# Of a shell and its machine; nothing of ours is in them.
SHELL = {".", "cat", "cd", "cp", "echo", "export", "for", "head", "ls", "mkdir", "mv", "rm", "source", "tail", "wait"}


def _extras() -> set[str]:
    with mock.patch.object(setuptools, "setup") as setup, contextlib.chdir(ROOT):
        runpy.run_path("setup.py")
    return set(setup.call_args.kwargs["extras_require"])


EXTRAS = _extras()
_PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
STAGES = {marker.partition(":")[0] for marker in _PYTEST["markers"]}


def begin(start: Callable) -> None:
    """In place of absl's `app.run`: all that scripts do before their own work."""
    values = flags.FLAGS
    remaining = values(sys.argv)[1:]
    if remaining:
        raise flags.Error(f"{remaining[0]!r} is no flag")
    if "config" in values and values.config is not None:
        experiment_from(values.config.to_dict())
        if "sweep" in values and not values.report:
            from experiment import config_arguments
            from sweeps import points

            points.expand(config_arguments(sys.argv[1:]), values.sweep)


def script_problem(path: str, arguments: list[str]) -> str | None:
    """What a script of launch/ has against its arguments; None for nothing."""
    script = ROOT / path
    if not script.is_file():
        return f"there is no {path}"
    before = set(flags.FLAGS)
    silent = io.StringIO()
    try:
        with (
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(silent),
            contextlib.redirect_stderr(silent),
            mock.patch.object(sys, "argv", [str(script), *arguments]),
            mock.patch.object(sys, "path", [str(ROOT / "launch"), *sys.path]),
            mock.patch.object(app, "run", begin),
        ):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit:  # of --show_config, and of mistakes
        return None if exit.code in (None, 0) else str(exit.code)
    except (ConfigError, flags.Error, ValueError) as error:
        return str(error)
    finally:
        for name in set(flags.FLAGS) - before:  # libraries that the script was the first to import keep theirs
            if name.startswith("config") or flags.FLAGS.find_module_defining_flag(name) == str(script):
                delattr(flags.FLAGS, name)
    return None


def _setup_problem(arguments: list[str]) -> str | None:
    unknown = set(arguments[0].split(",")) - EXTRAS if arguments else {"nothing"}
    return f"setup.py has no extra {', '.join(sorted(unknown))}" if unknown else None


def _pytest_problem(arguments: list[str]) -> str | None:
    for flag, value in itertools.pairwise(arguments):
        if flag == "-m" and value not in STAGES | {""}:
            return f"pytest has no stage {value!r}"
    paths = [word.partition("::")[0] for word in arguments if word.startswith("tests")]
    return next((f"there is no {path}" for path in paths if not (ROOT / path).exists()), None)


def _robot_loop_problem(arguments: list[str]) -> str | None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            options = make_parser().parse_args(arguments)
        except SystemExit:
            return said.getvalue().strip().splitlines()[-1]
    return None if options.robot or options.dry_run else "expected --robot, or --dry_run"


def _sphinx_problem(arguments: list[str]) -> str | None:
    return None if any((ROOT / word / "conf.py").is_file() for word in arguments) else "no folder of it has a conf.py"


def _pip_problem(arguments: list[str]) -> str | None:
    for extras in (match[1] for word in arguments if (match := re.fullmatch(r"\.\[(.+)\]", word))):
        return _setup_problem([extras])
    folders = [word for word in arguments if word.startswith("./")]
    return next((f"{folder} is no package" for folder in folders if not (ROOT / folder / "pyproject.toml").is_file()), None)


def _python_problem(arguments: list[str]) -> str | None:
    modules = {
        "mimic_video_client.robot_loop": _robot_loop_problem,
        "pip": _pip_problem,
        "pytest": _pytest_problem,
        "sphinx": _sphinx_problem,
    }
    match arguments:
        case ["-m", module, *rest]:
            return modules[module](rest) if module in modules else f"no check knows python -m {module}"
        case ["-c", code, *_]:
            ast.parse(code)
            return None
        case [script, *rest] if script.startswith("launch/"):
            return script_problem(script, rest)
    return f"no check knows python {' '.join(arguments)}"


def _pre_commit_problem(arguments: list[str]) -> str | None:
    return None if (ROOT / ".pre-commit-config.yaml").is_file() else "there is no .pre-commit-config.yaml"


PROGRAMS: Mapping[str, Callable[[list[str]], str | None]] = {
    "launch/setup.sh": _setup_problem,
    "pip": _pip_problem,
    "pre-commit": _pre_commit_problem,
    "pytest": _pytest_problem,
    "python": _python_problem,
}


def problem(words: list[str], known_only: bool) -> str | None:
    """What is wrong with a program and its arguments.

    Args:
        known_only: nothing is asked of programs that no check knows; a Python that they start is checked.
    """
    for place, word in enumerate(words):
        if word.rpartition("/")[2] == "python" and (place == 0 or known_only):
            return _python_problem(words[place + 1 :])
    name, arguments = words[0], words[1:]
    if name in PROGRAMS:
        return PROGRAMS[name](arguments)
    if name in SHELL or known_only:
        return None
    if "/" in name and os.access(ROOT / name, os.X_OK):
        return None
    return f"no check knows {name!r}: say before the block what it needs, as in <!-- needs a cloud -->"


def problems(text: str) -> list[str]:
    """All that is wrong with the commands of a document, each with its command."""
    written = stand_ins(text)
    lines = [(command, block.mark.startswith("needs ")) for block in blocks(text) for command in block.commands]
    lines += [(command, False) for command in inline_commands(text)]
    found = []
    for command, known_only in lines:
        for file, ours in written.items():
            command = re.sub(rf"(?<![\w/]){re.escape(file)}(?![\w/])", ours, command)
        for words in programs(command):
            if said := problem(words, known_only):
                found.append(f"{command}\n    {said}")
    return found


def python_problems(text: str) -> list[str]:
    """Blocks of Python that are no Python, or import from this tree what it does not have."""
    found = []
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            found.append(f"{error}\n{code}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in {"mimic_video", "data_pipelines"}:
                module = importlib.import_module(str(node.module))
                found += [f"{node.module} has no {name.name}" for name in node.names if not _has(module, name.name)]
    return found


def _has(module: types.ModuleType, name: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"{module.__name__}.{name}")
        return True
    return hasattr(module, name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_documents_would_start(document):
    text = document.read_text("utf-8")
    assert not (found := problems(text)), f"{document.name}:\n" + "\n".join(found)
    assert not (found := python_problems(text)), f"{document.name}:\n" + "\n".join(found)


def test_there_are_commands_of_every_kind():
    seen = {
        tuple(words[:2])
        for path in DOCUMENTS
        for block in blocks(path.read_text())
        for c in block.commands
        for words in programs(c)
    }
    scripts = {words[1] for words in seen if words[0].endswith("python") and words[1].startswith("launch/")}
    assert len(scripts) > 15
    assert {words[0] for words in seen} >= {"launch/setup.sh", "gcloud", "srun", "pip"}


def test_lines_are_divided_into_programs():
    line = "A=1 launch/setup.sh a,b && . x | tail -1 > log; N=$(gcloud a --format='value(x)') python b.py 'c d' --e=\"f g\" &"
    assert programs(line) == [
        ["launch/setup.sh", "a,b"],
        [".", "x"],
        ["tail", "-1"],
        ["gcloud", "a", "--format=value(x)"],
        ["python", "b.py", "c d", "--e=f g"],
    ]
    assert programs("for i in 1 2; do srun python a.py; done") == [["for", "i", "in", "1", "2"], ["srun", "python", "a.py"]]


WRONG = {
    "python launch/none.py": "there is no launch/none.py",
    "python launch/train.py --config=configs/quickstart.py:action": "--workdir",
    "python launch/train.py --config=configs/none.py --workdir=a": "there is no file configs/none.py",
    "python launch/train.py --config=configs/quickstart.py:action --workdir=a --wrokdir=b": "wrokdir",
    "python launch/train.py --config=configs/quickstart.py:action --workdir=a b": "'b' is no flag",
    "python launch/train.py --config=configs/quickstart.py:action --workdir=a --config.train.step=5": "train.steps",
    "python launch/train.py --config=configs/quickstart.py:action --workdir=a --config.data.past_frames=4": "data.past_frames",
    "python launch/train.py --config=configs/quickstart.py:none --workdir=a": "none",
    "python launch/serve.py --policy=a --port=b": "--port=b",
    "python launch/export.py --workdir=a --out=b --weights=int4": "int4",
    "python launch/sweep.py --config=configs/quickstart.py:action --sweep=none --workdir=a": "there is no sweep_none()",
    "python launch/benchmark.py nothing": "nothing",
    "launch/setup.sh data,none": "no extra none",
    "python -m pytest -m none": "no stage 'none'",
    "pytest tests/none.py::test": "there is no tests/none.py",
    "pip install ./tests": "./tests is no package",
    "pip install -e '.[data,none]'": "no extra none",
    "python -m mimic_video_client.robot_loop --server=a": "--prompt",
    "python -m sphinx tests out": "no folder of it has a conf.py",
    "python other.py": "no check knows python other.py",
    "gcloud a": "no check knows 'gcloud'",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_commands_are_found(command):
    (found,) = problems(f"```bash\n{command}\n```\n")
    assert found.startswith(command) and WRONG[command] in found


def test_commands_that_are_right_have_no_problem():
    text = """\
<!-- configs/yours.py stands for configs/quickstart.py -->
```bash
python launch/train.py --config=configs/yours.py:video --workdir=a --config.train.steps=99 && pytest -m slow tests/test_docs.py
python launch/train.py --config=configs/yours.py:video --show_config
```
Say `python launch/serve.py --policy=RUN`, or `python launch/compile.py --config=... --topology=...`.
<!-- needs a cloud -->
```bash
gcloud b; srun --ntasks=2 python launch/train.py --config=configs/yours.py:action --workdir=gs://b/c
```
"""
    assert problems(text) == []
    wrong = text.replace("--policy=RUN", "--polcy=RUN").replace("configs/yours.py:action", "configs/other.py:action")
    assert [found.splitlines()[0][:20] for found in problems(wrong)] == ["gcloud b; srun --nta", "python launch/serve."]


def test_python_that_is_wrong_is_found():
    text = "```python\nfrom mimic_video import Policy, None_such\nfrom mimic_video.runs import storage\n```\n```python\nif\n```\n"
    first, second = python_problems(text)
    assert first == "mimic_video has no None_such" and "invalid syntax" in second
