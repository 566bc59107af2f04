"""The commands of docs/rerun.md, as they stand, with a small experiment in the place of the quickstart."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
from documented import commands
from recordings import read, series

from data_pipelines.assembly import TrainingData
from data_pipelines.writers import write_rlds
from mimic_video.config import to_dict
from mimic_video.policy.policy import Policy
from mimic_video.registry import SIMULATORS
from mimic_video.runs import checkpoints
from mimic_video_client import PolicyClient

pytestmark = pytest.mark.reference

ROOT = pathlib.Path(__file__).parents[2]
EVALUATION = {"simulator": "point", "tasks": ("left",), "episodes_per_task": 2, "max_steps": 7, "workers": 1}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory with the quickstart's files, of networks that are random."""
    monkeypatch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "tests" / "own_simulator.py", tmp_path / "configs" / "my_simulator.py")
    monkeypatch.syspath_prepend(tmp_path / "configs")
    folder, episodes = tmp_path / "runs" / "quickstart" / "data", [tiny.episode(15, seed) for seed in (0, 1)]
    splits = {"train": episodes, "val": [tiny.episode(15, 2)]}
    written = write_rlds(folder, "demonstrations", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")
    data = str(written.relative_to(tmp_path))
    assert data == "runs/quickstart/data/demonstrations/1.0.0"
    monkeypatch.chdir(tmp_path)
    configs = {
        stage: tiny.experiment(stage=stage, data={"action_dataset": data, "video_dataset": data}, evaluation=EVALUATION)
        for stage in ("video", "action")
    }
    (tmp_path / "configs" / "quickstart.py").write_text(
        "import ml_collections\nimport my_simulator\n\n\ndef get_config(stage):\n"
        f"    return ml_collections.ConfigDict({to_dict(configs['action'])!r} | {{'stage': stage}})\n"
    )
    for stage, config in configs.items():
        robots = TrainingData(config).open().robots() if stage == "action" else None
        checkpoints.save_converted(tmp_path / "runs" / "quickstart" / stage, config, tiny.params(config), robots)
    yield tmp_path
    sys.modules.pop("my_simulator", None)


def test_the_commands_of_the_document(launch, clone):
    inspect, evaluate, video, serve = (
        command.removeprefix("python launch/").replace(".py", "", 1).split()
        for command in commands("docs/rerun.md", "run by tests/launch/test_rerun_document.py")
    )
    launch(*inspect)
    found = read("runs/data.rrd")
    assert {name.rpartition("/")[0].removesuffix("/camera") for name in found} == {
        "demonstrations/episode_0",
        "demonstrations/episode_1",
    }
    np.testing.assert_array_equal(series(found["demonstrations/episode_1/actions"])[1], tiny.episode(15, 1).actions)

    assert "left: " in launch(*evaluate)
    found, hz = read("runs/rollouts.rrd"), tiny.experiment().data.control_hz
    places = {f"left/{seed}" for seed in (1_000_000, 1_000_001)}
    assert {"/".join(name.split("/")[:2]) for name in found} == places
    for place in places:
        times, actions = series(found[f"{place}/actions"])
        plan_times, plans = series(found[f"{place}/plans/0"])
        np.testing.assert_allclose(times, np.arange(len(actions)) / hz, atol=1e-8)
        np.testing.assert_array_equal(plans[0], actions[0])  # the first action of the first plan is executed at once
        assert plan_times[0] == 0 and len(found[f"{place}/camera/primary"]) == len(actions) + 1
        assert found[f"{place}/instruction"][0][1]["text"] == ["move left"]

    launch(*video)
    found = read("runs/video.rrd")
    assert {name for name in found if name.startswith("window_0/")} == {
        "window_0/recorded/primary",
        "window_0/predicted/primary",
        "window_0/instruction",
    }

    command = [sys.executable, str(ROOT / "launch" / f"{serve[0]}.py"), *serve[1:], "--port=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            address = process.stdout.readline().split()[-1]
            images = np.random.default_rng(0).integers(0, 256, (1, 5, *tiny.SIZE, 3), np.uint8)
            state = np.ones((1, 3), np.float32)
            message = {"images": {"primary": images}, "state": state, "prompt": "do it", "robots": 1, "query": 1}
            with PolicyClient(address, timeout=120.0) as client:
                answer = client.infer(message)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()
    found = read("runs/robot.rrd")
    np.testing.assert_array_equal(series(found["connection_0/robot_0/plans/0"])[1], answer["actions"][0])
    np.testing.assert_allclose(
        answer["actions"], Policy.load("runs/quickstart/action")(images, state, ["do it"], 1), rtol=1e-4, atol=1e-5
    )


def test_what_a_command_cannot_log(launch, clone):
    arguments = "--config=configs/quickstart.py:action", "--workdir=runs/quickstart/expert"
    assert "expected it without --expert" in launch("evaluate", *arguments, "--expert", "--rerun=a.rrd")
    assert "no viewer of Rerun listens at 127.0.0.1:9 " in launch("evaluate", *arguments, "--rerun=connect:127.0.0.1:9")
    assert not pathlib.Path("runs/quickstart/expert").exists()
