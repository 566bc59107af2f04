"""The commands of docs/sweeps.md, as they stand, with a small experiment in the place of the quickstart."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import devices
import pytest
import tiny
from documented import commands

from data_pipelines.writers import write_rlds
from mimic_video.config import to_dict
from mimic_video.runs.status import read_status

ROOT = pathlib.Path(__file__).parents[2]
OWN = ROOT / "tests" / "own_simulator.py"
DOCUMENT, MARK = "docs/sweeps.md", "run by tests/launch/test_sweeps_document.py"
SWEEPS = """

def sweep_lr():
    yield {"train.learning_rate": 1e-4}
    yield {"train.learning_rate": 1e-3}


def sweep_weight_decay():
    yield {"train.weight_decay": 0.1}


def sweep_seed():
    yield {"seed": 1}


def sweep_stop_step():
    yield {"policy.stop_step": 1}
"""
POINTS = [f"learning_rate={rate},weight_decay=0.1" for rate in (0.0001, 0.001)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with launch/ and configs/quickstart.py, where commands are run."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)], "val": [tiny.episode(15, 2)]}
    data = str(write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    evaluation = {"simulator": "point", "tasks": ("left",), "episodes_per_task": 1, "max_steps": 2, "workers": 1}
    experiment = tiny.experiment(data={"action_dataset": data}, train={"validate_every": 2}, evaluation=evaluation)
    shutil.copy(OWN, folder / "configs" / "my_simulator.py")
    (folder / "configs" / "quickstart.py").write_text(
        "import ml_collections\nimport my_simulator\n\n\ndef get_config(stage):\n"
        f"    return ml_collections.ConfigDict({to_dict(experiment)!r} | {{'stage': stage}})\n{SWEEPS}"
    )
    return folder


def run(command, clone):
    """What a command of the document prints; it has to succeed."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | devices.of_each(1) | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.processes
def test_the_commands_in_their_order(clone):
    train, dry, evaluate, stop_step, report, by_metric = commands(DOCUMENT, MARK)
    runs = clone / "runs"
    assert "2 points in 2 runs, of which 0 have finished" in run(train, clone)
    assert [read_status(runs / "sweep" / point).state for point in POINTS] == ["finished", "finished"]
    assert "2 points in 2 runs, of which 2 have finished" in run(dry, clone)
    started = [read_status(runs / "sweep" / point).starts for point in POINTS]
    run(evaluate, clone)
    for point in POINTS:
        assert (runs / "sweep" / point / "evaluation.json").is_file() and read_status(runs / "sweep" / point).starts == 1
    assert started == [1, 1]
    run(stop_step, clone)
    folder = runs / "stop_step"
    assert [path.parent.name for path in folder.glob("*/checkpoints")] == ["seed=1"]
    (evaluation,) = folder.glob("seed=1/evaluations/*/evaluation.json")
    assert evaluation.parent.name == "seed=1,stop_step=1" and json.loads(evaluation.read_text())["policy"]["stop_step"] == 1
    for name in ("sweep.csv", "sweep.html"):
        (runs / "sweep" / name).unlink(missing_ok=True)
    assert "learning_rate=0.001" in run(report, clone)
    assert (runs / "sweep" / "sweep.html").is_file()
    run(by_metric, clone)
    with open(runs / "sweep" / "sweep.csv") as file:
        assert {row["train.learning_rate"] for row in csv.DictReader(file)} == {"0.0001", "0.001"}


def test_the_commands_are_those_of_the_quickstart():
    """With the sweeps that it has, which the tests of configs/ expand."""
    text = (ROOT / "configs" / "quickstart.py").read_text()
    named = [flag for command in commands(DOCUMENT, MARK) for flag in command.split() if flag.startswith("--sweep=")]
    assert len(named) == 4
    assert all(f"def sweep_{name}()" in text for flag in named for name in flag.removeprefix("--sweep=").split(","))
