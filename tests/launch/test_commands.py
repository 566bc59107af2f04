"""The vocabulary of flags, docs/commands.md, held against the scripts; and commands that documents name against both."""

import collections
import pathlib
import re

import notebooks
import pytest

from mimic_video.config import ExperimentConfig, field_paths
from mimic_video_client.robot_loop import make_parser

ROOT = pathlib.Path(__file__).parents[2]
SHARED = {"experiment", "shipped"}  # what scripts have in common
SCRIPTS = sorted({path.stem for path in (ROOT / "launch").glob("*.py")} - SHARED)
_COMMAND = re.compile(r"(?:launch/|-m mimic_video_client\.)(\w+)(?:\.py)?((?:\\\\?\n|[^\n`#|&])*)")


def table() -> dict[str, set[str]]:
    """Command → its flags."""
    text = (ROOT / "docs" / "commands.md").read_text()
    found = collections.defaultdict(set)
    for flag, commands in re.findall(r"^\| `--(\w+)` \|.*\| (.*?) \|$", text, re.M):
        for command in re.findall(r"`(\w+)`", commands):
            found[command].add(flag)
    return found


def commands(text: str) -> list[tuple[str, set[str]]]:
    """(name, flags) of the commands in a text, which may go on in the next line."""
    return [
        (name, set(re.findall(r"(?<!\S)\[?--(?:no(?=compilation))?(\w+)", arguments)))
        for name, arguments in _COMMAND.findall(text)
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_has_the_flags_of_a_script(launch, script):
    text = launch(script, "--help")
    flags = set(re.findall(r"^  (?:-\w,)?--(?:\[no\])?(\w+):", text, re.M))
    assert flags == table()[script]
    if "config" in flags:
        assert "--config.FIELD=VALUE" in text and "--show_config lists" in text.replace("\n    ", " ")


def test_the_table_has_the_flags_of_the_client_and_no_other_command():
    client = set(re.findall(r"^  --(\w+)", make_parser().format_help(), re.M))
    assert client == table()["robot_loop"]
    assert table().keys() == {*SCRIPTS, "robot_loop"}


def test_commands_are_found():
    text = "a `python launch/train.py --config=a.py:b --config.seed=1 \\\n  --workdir=c` --d\n launch/x.py [--e | --f=1]\n--g"
    assert commands(text) == [("train", {"config", "workdir"}), ("x", {"e"})]


def test_flags_of_commands_in_documents_are_in_the_table():
    known, found = table(), 0
    folders = ("docs", "configs", "launch", "mimic_video", "mimic_video_client", "data_pipelines", ".ci")
    files = [
        path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".md", ".py", ".ipynb", "")
    ]
    for path in [*ROOT.glob("*.md"), *(path for path in files if path.is_file())]:
        if path.name == "CHANGELOG.md":  # which speaks of the past, too
            continue
        for name, flags in commands(notebooks.text(path) if path.suffix == ".ipynb" else path.read_text()):
            if name == "NAME":
                continue
            found += len(flags)
            assert not flags or name in known, f"{path} names a command {name}"
            assert flags <= known.get(name, set()), f"{path}: {name} has no {flags - known[name]}"
    assert found > 50


def test_show_config_lists_every_field(launch):
    """Without the other flags of the script."""
    text = launch("train", f"--config={ROOT / 'configs' / 'quickstart.py'}:action", "--show_config", "--config.seed=7")
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["field"].split() == ["field", "value", "default", "comment"]
    assert re.fullmatch(r"seed +7 +0 +of initial parameters, .*", lines["seed"])
    assert re.fullmatch(r"data.image_size +\(48, 48\) +\(480, 640\) +height, width in pixels, as .*", lines["data.image_size"])
    assert re.fullmatch(r"policy.stop_step +0 +0 +video denoising steps .*", lines["policy.stop_step"])
    assert list(lines) == ["field", *field_paths(ExperimentConfig)]


def test_show_config_needs_an_experiment(launch):
    assert launch("train", "--show_config") == "error: --show_config needs --config, the experiment to show"
    wrong = launch("train", f"--config={ROOT / 'configs' / 'quickstart.py'}", "--show_config", "--config.data.workers=-1")
    assert wrong.startswith("error: config field 'data.workers' is -1")
