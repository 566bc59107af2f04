"""Simulators by name, with one that is registered by a module outside of the package."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tiny

from data_pipelines.sources.experts import STEPS_AFTER_SUCCESS, demonstrations
from data_pipelines.workers import worker_processes
from mimic_video.config import ConfigError
from mimic_video.evaluation import simulators
from mimic_video.evaluation.delays import delay_table, evaluate_delays
from mimic_video.evaluation.metaworld import MetaworldFactory
from mimic_video.evaluation.rollouts import run_expert, run_rollouts
from mimic_video.evaluation.simulators import factories, with_expert, with_hand
from mimic_video.registry import SIMULATORS

OWN = pathlib.Path(__file__).parents[1] / "own_simulator.py"
SETTINGS = {"simulator": "point", "tasks": ("left", "right"), "episodes_per_task": 3, "max_steps": 30}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module that can be imported, here and by workers, and has not been."""
    shutil.copy(OWN, tmp_path / "my_simulator.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_simulator"
    sys.modules.pop("my_simulator", None)


def experiment(**evaluation):
    return tiny.experiment(evaluation=SETTINGS | evaluation)


def plan(images, proprio, instructions, query_index, *committed):
    """Towards the goal, as an expert would, four actions at a time."""
    goals = np.float32([[{"move left": -0.5, "move right": 0.5}[text], 0] for text in instructions])
    assert images["primary"].shape == (len(proprio), 5, *tiny.SIZE, 3)
    assert (images["primary"].max((2, 3, 4)) == 255).all()  # in every frame the point is seen
    return np.repeat(np.clip((goals - proprio[:, :2]) / 0.4, -1, 1)[:, None], 4, axis=1)


def assert_same_episodes(results, others):
    assert results == others  # task, seed, success and steps
    for result, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(result.proprio, other.proprio)
        np.testing.assert_array_equal(result.actions, other.actions)
        np.testing.assert_array_equal(result.frames["primary"], other.frames["primary"])


def test_a_module_of_ones_own_registers_a_simulator(own):
    assert sum(bool(line.strip()) for line in OWN.read_text().splitlines()) <= 60
    config = experiment(workers=2)
    with pytest.raises(ConfigError, match=r"'evaluation\.simulator' is 'point'; expected one of 'metaworld', or"):
        factories(config)
    __import__(own)
    results = run_rollouts(plan, factories(config), config, record=3)
    assert [(r.task, r.success) for r in results] == [("left", True)] * 3 + [("right", True)] * 3
    assert len({r.proprio[0].tobytes() for r in results[:3]}) == 3  # seeds start elsewhere
    assert results[0].frames["primary"].shape == (results[0].steps + 1, *tiny.SIZE, 3)
    for workers in (1, 3):
        again = experiment(workers=workers)
        assert_same_episodes(run_rollouts(plan, factories(again), again, record=3), results)


def test_a_simulator_may_be_named_by_its_function(own):
    config = experiment(simulator=f"{own}:PointFactory", tasks=("right",))
    assert [result.success for result in run_rollouts(plan, factories(config), config)] == [True] * 3


def test_settings_are_those_of_the_experiment(own):
    config = experiment(simulator=f"{own}:PointFactory", layout="joints")
    expected = simulators.EnvironmentSettings(tiny.SIZE, ("primary",), 10.0, "joints", 30)
    assert factories(config)("left").settings == expected
    assert factories(config, ("wrist",))("left").settings == dataclasses.replace(expected, cameras=("wrist",))


def test_its_expert_is_the_ceiling_and_demonstrates(own):
    config = experiment(simulator=f"{own}:PointFactory")
    assert [(r.task, r.success) for r in run_expert(factories(config), config)] == [("left", True)] * 3 + [("right", True)] * 3
    factory = with_expert(factories(config)("left"))
    with worker_processes(1) as workers:
        episodes = list(itertools.islice(demonstrations(factory, "point/left", itertools.count(), workers), 4))
    assert [episode.name for episode in episodes] == [f"point/left/seed {seed}" for seed in range(4)]
    for seed, episode in enumerate(episodes):
        assert episode.instruction == "move left" and episode.action_layout == "vector"
        np.testing.assert_allclose(np.diff(episode.timestamps), 0.1)
        environment = factory()
        environment.reset(seed=seed)
        np.testing.assert_allclose(episode.actions[0], np.clip(([-0.5, 0] - environment.position) / 0.1, -1, 1), rtol=1e-6)
    at_goal = np.abs(episodes[0].proprio[:, :2] - [-0.5, 0]).max(1) < 0.05  # seed 0 has no noise
    assert np.flatnonzero(at_goal).tolist() == list(range(len(at_goal) - STEPS_AFTER_SUCCESS, len(at_goal)))


def test_what_delays_do_to_it(own):
    config = experiment(simulator=f"{own}:PointFactory", episodes_per_task=2)
    rows = evaluate_delays(plan, factories(config), config, ["receding_horizon", "asynchronous"], {0: 0, 200: 2})
    assert [(r["strategy"], r["delay_ms"], r["delay_steps"]) for r in rows] == [
        ("receding_horizon", 0, 0),
        ("receding_horizon", 200, 2),
        ("asynchronous", 0, 0),
        ("asynchronous", 200, 2),
    ]
    assert rows[0]["success"]["overall"]["rate"] == 1.0 and rows[0]["jerk"] > 0 and rows[0]["commanded_jerk"] > 0
    assert rows[1]["seconds_to_success"] > rows[0]["seconds_to_success"]  # it holds still while it plans
    assert [line.split()[:2] for line in delay_table(rows).splitlines()[1:]] == [
        [row["strategy"], str(row["delay_ms"])] for row in rows
    ]
    assert json.loads(json.dumps(rows)) == rows


def test_unknown_names_list_those_there_are():
    SIMULATORS.register("other")(dict)
    with pytest.raises(
        ConfigError, match=r"'evaluation\.simulator' is 'metawrld'; expected one of 'metaworld', 'other', or 'module"
    ):
        factories(experiment(simulator="metawrld"))


def test_meta_world_is_found_by_its_name():
    config = experiment(simulator="metaworld", layout="delta")
    assert factories(config)("reach-v3") == MetaworldFactory("reach-v3", tiny.SIZE, "delta")
    with pytest.raises(ConfigError, match="'draw-open'; did you mean 'drawer-open-v3'"):
        factories(config)("draw-open")


def test_what_a_simulator_cannot_do_is_told():
    with pytest.raises(ConfigError, match="has no scripted expert; expected the method of ExpertFactory"):
        with_expert(dict)
    with pytest.raises(ConfigError, match="does not know how its robot holds still; expected the methods of HandFactory"):
        with_hand(dict)
