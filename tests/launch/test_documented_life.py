"""From training to the report, by the commands of docs/finetuning.md, docs/data.md and docs/evaluation.md as they stand.

They are run in their order, in this process, in a folder whose configs/ has a small experiment in the place of the reader's and
of the quickstart's.
"""

import pathlib
import shlex
import shutil
import sys

import pytest
import tiny
from documented import commands

from mimic_video.config import to_dict
from mimic_video.registry import SIMULATORS
from mimic_video.runs.status import read_status

OWN = pathlib.Path(__file__).parents[1] / "own_simulator.py"
MARK = "run by tests/launch/test_documented_life.py"
EVALUATION = {"simulator": "point", "tasks": ("left",), "episodes_per_task": 1, "max_steps": 6, "workers": 1}


@pytest.fixture
def clone(launch, tmp_path, monkeypatch):
    """The folder, with demonstrations of the simulator's expert."""
    monkeypatch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    shutil.copy(OWN, tmp_path / "configs" / "my_simulator.py")
    dataset = str(tmp_path / "data" / "demonstrations" / "1.0.0")
    data = {"action_dataset": dataset, "video_dataset": dataset}
    experiment = tiny.experiment(data=data, evaluation=EVALUATION, train={"steps": 2})
    for name in ("yours", "quickstart"):
        (tmp_path / "configs" / f"{name}.py").write_text(
            "import ml_collections\nimport my_simulator\n\n\ndef get_config(stage):\n"
            f"    return ml_collections.ConfigDict({to_dict(experiment)!r} | {{'stage': stage}})\n"
        )
    counts = ["--videos=1", "--demonstrations=2", "--validation=1"]
    launch("collect", "--config=configs/yours.py:action", "--out=data", *counts)
    yield tmp_path
    sys.modules.pop("my_simulator", None)


@pytest.fixture
def run(launch, clone):
    """run(command) → what a command of a document prints, if it succeeds."""

    def run(command):
        interpreter, script, *arguments = shlex.split(command.replace("/data/latents", str(clone / "latents")))
        assert interpreter == "python" and script.startswith("launch/")
        printed = launch(pathlib.Path(script).stem, *arguments)
        assert "error: " not in printed, f"{command}\n{printed}"
        return printed

    return run


@pytest.mark.training
def test_the_commands_in_their_order(run, clone):
    video, action, show = commands("docs/finetuning.md", MARK)
    run(video)
    run(action)
    assert {read_status(clone / "runs" / name).state for name in ("video", "action")} == {"finished"}
    assert "0.0003" in run(show)

    (precompute,) = commands("docs/data.md", MARK)
    run(precompute)
    assert list((clone / "latents").iterdir())

    quickstart = clone / "runs" / "quickstart"
    shutil.copytree(clone / "runs" / "video", quickstart / "video")
    others = ("action-1", "action-untrained-0", "action-untrained-1")
    for name in ("action", *others):
        shutil.copytree(clone / "runs" / "action", quickstart / name)
    *evaluations, report = commands("docs/evaluation.md", MARK)
    for command in evaluations:
        run(command)
    assert all((quickstart / name / "evaluation.json").is_file() for name in ("video", "action", "expert"))
    for name in others:
        shutil.copy(quickstart / "action" / "evaluation.json", quickstart / name)
    run(report)
    assert "untrained backbone" in (quickstart / "report.html").read_text()
