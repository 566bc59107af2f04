"""The doctor finds faults that were planted in data and runs, and none in a run that has none."""

import dataclasses
import fcntl
import os
import shutil

import blob_world
import documented
import jax
import numpy as np
import pytest

from data_pipelines.assembly import TrainingData
from data_pipelines.writers import write_rlds
from mimic_video.runs import directory
from mimic_video.runs.storage import run_path
from mimic_video.training.loop import train

pytestmark = pytest.mark.training

LOOK = ["--episodes=24", "--windows=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset, runs that learned it with and without some of the inputs, and a run on shuffled actions; by their names.

    Of pytest's workers one makes it, and the others wait: it takes minutes.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "world"
    root.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / "made").exists():
                _make_world(root)
                (root / "made").touch()
        yield root


def _make_world(root):
    good, new = blob_world.episodes(96), blob_world.episodes(24, 1000)
    shuffled = [_changed(each, "actions", _deal(each)) for each in (good, new)]
    sets = {name: _write(root, name, *splits) for name, splits in (("blobs", (good, new)), ("shuffled", shuffled))}
    _train(root, "video", sets["blobs"], 450)
    _train(root, "healthy", sets["blobs"], 350)
    for name, dataset, cut in (
        ("shuffled_run", "shuffled", ()),
        ("without_video", "blobs", ("video",)),
        ("without_prompts", "blobs", ("text",)),
    ):
        _train(root, name, sets[dataset], 200, cut)


def _train(root, name, dataset, steps, cut=()):
    stage = "video" if name == "video" else "action"
    backbone = {} if stage == "video" else {"backbone_run": str(root / "video")}
    config = blob_world.experiment(stage, dataset, steps, **backbone)
    train(config, root / name, blob_world.InMemory(config, cut))


def _write(root, name, *splits):
    splits = dict(zip(("train", "val"), splits, strict=False))
    return write_rlds(root, name, splits, control_hz=blob_world.HZ, image_size=blob_world.SIZE, description="")


def _changed(episodes, field, change):
    return blob_world.changed(episodes, **{field: change})


def _deal(episodes):
    order = np.random.default_rng(0).permutation(len(episodes))
    return lambda episode, number: episodes[order[number]].actions


def _in_column(column, change):
    def values(episode, number):
        actions = episode.actions.copy()
        actions[:, column] = change(actions[:, column])
        return actions

    return values


@pytest.fixture
def doctor(launch, tmp_path):
    """doctor(run, *arguments) → check → (level, sentence) of what was printed, and the exit code by whether there is a fault."""

    def examine(run, *arguments):
        out = tmp_path / "doctor.html"
        text = launch("doctor", f"--run={run}", f"--out={out}", *LOOK, *arguments)
        assert f"wrote {out}" in text, text
        lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith(("fault", "doubt", "fine"))]
        found = {check: (level, seen) for level, rest in lines for check, seen in [rest.split(": ", 1)]}
        page = out.read_text()
        assert page.count('class="answer no"') == sum(level == "fault" for level, _ in found.values())
        return found

    return examine


def faults(found):
    return {check for check, (level, _) in found.items() if level == "fault"}


def test_a_healthy_run(doctor, world):
    """By the first command of docs/doctor.md; the second one is that of the constant dimension."""
    (first, second) = documented.commands("docs/doctor.md", "run by tests/launch/test_doctor.py")
    assert first == "python launch/doctor.py --run=runs/action"
    assert second == f"{first} --source=data/new/1.0.0 --split=train --out=new.html"
    found = doctor(world / "healthy")
    assert faults(found) == set(), found
    assert {level for check, (level, _) in found.items() if check not in ("flow time", "held action")} == {"fine"}
    assert len(found) == 18


def test_a_healthy_run_of_stage_video(doctor, world):
    found = doctor(world / "video")
    assert {check: level for check, (level, _) in found.items()} == dict.fromkeys(
        ("video prediction", "video rate", "prompt", "cameras"), "fine"
    )


def test_swapped_cameras(doctor, world):
    new = blob_world.changed(
        blob_world.episodes(24, 1000),
        frames=lambda episode, _: episode.further_cameras["wrist"],
        further_cameras=lambda episode, _: {"wrist": episode.frames},
    )
    found = doctor(world / "healthy", f"--source={_write(world, 'swapped', new)}", "--split=train")
    assert "cameras" in faults(found) and "two cameras are swapped: with the cameras primary ↔ wrist" in found["cameras"][1]
    assert faults(found).isdisjoint({"action rate", "video rate", "direction", "statistics"})


def test_wrong_rate(doctor, world):
    """Recorded at 4 Hz, labelled as 2 Hz."""
    new = blob_world.episodes(24, 1000, slower=2)
    found = doctor(world / "healthy", f"--source={_write(world, 'slow', new)}", "--split=train")
    assert "action rate" in faults(found) and "slower than the model expects" in found["action rate"][1]
    assert "0.5" in found["action rate"][1].partition("times its speed")[0]  # of the speeds that fit
    assert faults(found).isdisjoint({"cameras", "direction", "statistics", "prompt", "proprioception"})


def test_inverted_gripper(doctor, world):
    new = _changed(blob_world.episodes(24, 1000), "actions", _in_column(2, lambda values: 1 - values))
    found = doctor(world / "healthy", f"--source={_write(world, 'inverted', new)}", "--split=train")
    assert "direction" in faults(found) and "gripper (or another switch) in action dimension 2" in found["direction"][1]
    assert "action dimension 0" not in found["direction"][1]
    assert faults(found).isdisjoint({"cameras", "action rate", "statistics", "video"})


def test_constant_dimension(doctor, world):
    new = _changed(blob_world.episodes(24, 1000), "actions", _in_column(1, lambda values: 0 * values + 0.25))
    found = doctor(world / "healthy", f"--source={_write(world, 'constant', new)}", "--split=train")
    assert faults(found) == {"constant dimensions"}
    assert found["constant dimensions"][1] == "action dimension 1 is constant at 0.25, but not in training"


def test_statistics_of_another_dataset(doctor, world):
    """In degrees, where the data are in radians."""
    degrees = {
        name: (lambda episode, _, name=name: getattr(episode, name) * np.float32([57.3, 57.3, 1]))
        for name in ("actions", "proprio")
    }
    other = _write(world, "degrees", blob_world.changed(blob_world.episodes(20), **degrees))
    run = shutil.copytree(world / "healthy", world / "other_statistics")
    (robot,) = TrainingData(blob_world.experiment("action", other, 30)).open().robots().values()
    directory.save_embodiments(run_path(run), {"blobs": dataclasses.replace(robot, name="blobs", datasets=("blobs",))})
    found = doctor(run)
    assert "statistics" in faults(found) and "action dimension 0 has mean" in found["statistics"][1]
    assert faults(found).isdisjoint({"direction", "cameras"})


def test_shuffled_actions(doctor, world):
    found = doctor(world / "shuffled_run")
    assert {"actions and states", "mean action"} <= faults(found)
    assert "do not fit the recorded states" in found["actions and states"][1]
    assert faults(found).isdisjoint({"prompt", "video", "proprioception", "statistics", "cameras"})  # which it cannot tell


def test_a_policy_of_proprioception_alone(doctor, world):
    found = doctor(world / "without_video")
    assert faults(found) - {"held action"} == {"video"}
    assert "acts by proprioception alone and ignores the video" in found["video"][1]


def test_a_policy_that_ignores_prompts(doctor, world):
    found = doctor(world / "without_prompts")
    assert faults(found) - {"held action"} == {"prompt"} and "the policy ignores the prompt" in found["prompt"][1]


def test_mistakes(launch, world, tmp_path):
    assert launch("doctor", f"--run={tmp_path}").startswith("error: ")
    unknown = launch("doctor", f"--run={world / 'healthy'}", "--split=test")
    assert unknown.startswith("error: ") and "'test'" in unknown
    one = _write(tmp_path, "one", blob_world.episodes(1))
    message = launch("doctor", f"--run={world / 'healthy'}", f"--source={one}", "--split=train")
    assert message == "error: one has one episode to look at; expected two or more, since intervals are over episodes"
    assert launch("doctor", "--run=gs://bucket/run").startswith("error: ")
