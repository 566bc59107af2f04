"""Experts and policies in a simulator that the experiment's file registers, by the launch scripts."""

import json
import pathlib
import shutil
import sys

import pytest
import tiny

from data_pipelines.assembly import TrainingData
from data_pipelines.sources.rlds import RldsSource
from mimic_video.registry import SIMULATORS
from mimic_video.runs import checkpoints

OWN = pathlib.Path(__file__).parents[1] / "own_simulator.py"
EVALUATION = {"simulator": "point", "tasks": ("left",), "episodes_per_task": 2, "max_steps": 25, "workers": 1}


@pytest.fixture
def experiment_file(config_file, tmp_path, monkeypatch):
    """experiment_file(**changes) → a file like a user's, that imports a module which registers the simulator."""
    monkeypatch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))
    shutil.copy(OWN, tmp_path / "my_simulator.py")
    monkeypatch.syspath_prepend(tmp_path)

    def write(**changes):
        path = config_file(tiny.experiment(evaluation=EVALUATION, **changes))
        path.write_text(f"import my_simulator\n{path.read_text()}")
        return path

    yield write
    sys.modules.pop("my_simulator", None)


def test_experts_of_any_simulator_are_evaluated_and_collected(launch, experiment_file, tmp_path):
    file, folder, run = experiment_file(), tmp_path / "data", tmp_path / "expert"
    assert "left: 2/2 = 1.00, 95 % interval" in launch("evaluate", f"--config={file}", f"--workdir={run}", "--expert")
    assert [e["success"] for e in json.loads((run / "evaluation.json").read_text())["episodes"]] == [True, True]
    launch("collect", f"--config={file}", f"--out={folder}", "--videos=1", "--demonstrations=2", "--validation=1")
    assert list(folder.glob("demonstrations/1.0.0/*.tfrecord-*"))  # which others read
    source = RldsSource(str(folder / "demonstrations" / "1.0.0"), "train")
    assert len(source) == 2 and source[0].instruction == "move left" and source[0].actions.shape[1] == 2
    wrong = f"--config={file}", "--config.evaluation.simulator=pint"
    assert "'evaluation.simulator' is 'pint'; expected one of 'metaworld', 'point'" in launch("collect", *wrong, f"--out={run}")


@pytest.mark.training
def test_a_policy_acts_in_it(launch, experiment_file, tmp_path):
    """One of random networks; test_extensions.py trains in it."""
    folder, action = tmp_path / "data", tmp_path / "action"
    counts = ["--videos=1", "--demonstrations=2", "--validation=1"]
    launch("collect", f"--config={experiment_file()}", f"--out={folder}", *counts)
    dataset = str(folder / "demonstrations" / "1.0.0")
    changes = {"stage": "action", "data": {"action_dataset": dataset}}
    file, config = experiment_file(**changes), tiny.experiment(evaluation=EVALUATION, **changes)
    checkpoints.save_converted(action, config, tiny.params(config), TrainingData(config).open().robots())
    assert "left: " in launch("evaluate", f"--config={file}", f"--workdir={action}", "--recorded=1")
    assert len(list((action / "rollouts").glob("left_1000000_*.gif"))) == 1
    alone = f"--config={file}", f"--workdir={action}", f"--out={tmp_path / 'alone'}", "--config.evaluation.tasks=()"
    assert "held-out actions: error of " in launch("evaluate", *alone)  # where there is no simulator
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in (action, tmp_path / "alone")]
    assert evaluations[0]["open_loop"] == evaluations[1]["open_loop"] and "success" not in evaluations[1]
    table = launch("evaluate_delay", f"--config={file}", f"--workdir={action}", "--delays=0,200", "--strategy=receding_horizon")
    assert [line.split()[:2] for line in table.splitlines()[-2:]] == [["receding_horizon", "0"], ["receding_horizon", "200"]]
