import importlib
import multiprocessing
import os
import time

import numpy as np
import pytest
from counting import CountingFactory

from mimic_video.errors import ConfigError
from mimic_video.evaluation.environment import EnvironmentPool, WorkerError, checked_action, checked_observation


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    yield
    assert multiprocessing.active_children() == []


def test_rows_follow_the_seeds_across_workers():
    with EnvironmentPool(CountingFactory(), seeds=[5, 6, 7], num_workers=2) as pool:
        assert (pool.control_hz, pool.action_dim) == (20.0, 2)
        observation, instructions = pool.reset()
        assert instructions == ["count"] * 3
        assert observation["primary"].shape == (3, 2, 2, 3) and observation["proprio"].shape == (3, 4)
        assert observation["proprio"][:, 0].tolist() == [5, 6, 7]
        processes = observation["proprio"][:, 3].tolist()
        assert processes[0] == processes[1] != processes[2]  # two workers host 2 + 1 environments
        actions = np.array([[1, 0], [2, 2], [0, 0.5]], np.float32)
        observation, success, ended = pool.step(actions, np.ones(3, bool))
        assert observation["proprio"][:, 1].tolist() == [1, 4, 0.5]
        assert success.tolist() == [False, True, False] and ended.tolist() == [False] * 3


def test_inactive_environments_are_not_stepped_and_keep_their_observation():
    with EnvironmentPool(CountingFactory(goal=0.5), seeds=[0, 1], num_workers=1) as pool:
        pool.reset()
        actions = np.array([[1, 1], [np.nan, np.nan]], np.float32)
        observation, success, ended = pool.step(actions, np.array([True, False]))
        assert success.tolist() == [True, False] and ended.tolist() == [False, False]
        assert observation["proprio"][:, 2].tolist() == [1, 0]
        observation, *_ = pool.step(np.ones((2, 2), np.float32), np.array([False, True]))
        assert observation["proprio"][:, 2].tolist() == [1, 1]
        assert observation["primary"][:, 0, 0, 0].tolist() == [1, 1]
        assert pool.reset()[0]["proprio"][:, 2].tolist() == [0, 0]


def test_an_exception_in_a_worker_names_task_and_seed_and_carries_the_traceback():
    factory = CountingFactory(break_seed=8, breakage="raise")
    with EnvironmentPool(factory, seeds=[7, 8, 9], num_workers=2) as pool:
        pool.reset()
        with pytest.raises(WorkerError) as caught:
            pool.step(np.ones((3, 2), np.float32), np.ones(3, bool))
        message = str(caught.value)
        assert "CountingFactory" in message and "seed 8" in message
        assert "ZeroDivisionError: the simulator exploded" in message and "in step" in message
        with pytest.raises(RuntimeError, match="closed"):
            pool.reset()


def test_a_worker_that_dies_is_an_error_with_its_exit_code():
    factory = CountingFactory(break_seed=9, breakage="die")
    with EnvironmentPool(factory, seeds=[7, 8, 9], num_workers=2) as pool:
        pool.reset()
        with pytest.raises(WorkerError, match=r"seeds \[9\].*exit code 3"):
            pool.step(np.ones((3, 2), np.float32), np.ones(3, bool))


def test_a_worker_that_was_killed_between_two_steps_is_an_error():
    with EnvironmentPool(CountingFactory(), seeds=[7], num_workers=1) as pool:
        process_id = int(pool.reset()[0]["proprio"][0, 3])
        os.kill(process_id, 9)
        time.sleep(0.2)
        with pytest.raises(WorkerError, match="exit code -9"):
            pool.step(np.ones((1, 2), np.float32), np.ones(1, bool))


def test_a_factory_that_fails_is_an_error_of_the_constructor():
    with pytest.raises(WorkerError, match="no such simulator"):
        EnvironmentPool(CountingFactory(breakage="build"), seeds=[1, 2], num_workers=2)
    with pytest.raises(ConfigError, match=r"^no such task$"):  # a mistake of the user's has no traceback
        EnvironmentPool(CountingFactory(breakage="mistake"), seeds=[1, 2], num_workers=2)


def test_an_interrupt_while_waiting_closes_the_pool(monkeypatch):
    pool = EnvironmentPool(CountingFactory(), seeds=[0], num_workers=1)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._workers[0], "receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.reset()
    assert multiprocessing.active_children() == []


def test_bad_arguments_leave_the_pool_usable_and_a_bad_action_names_its_seed():
    with EnvironmentPool(CountingFactory(), seeds=[3, 4], num_workers=1) as pool:
        with pytest.raises(RuntimeError, match="reset the pool"):
            pool.step(np.zeros((2, 2), np.float32), np.ones(2, bool))
        pool.reset()
        with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
            pool.step(np.zeros((2, 3), np.float32), np.ones(2, bool))
        observation, *_ = pool.step(np.zeros((2, 2), np.float32), np.ones(2, bool))
        assert observation["proprio"][:, 2].tolist() == [1, 1]
        with pytest.raises(WorkerError, match=r"seed 4(.|\n)*not finite"):
            pool.step(np.array([[0, 0], [np.inf, 0]], np.float32), np.ones(2, bool))


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least one seed"):
        EnvironmentPool(CountingFactory(), seeds=[], num_workers=1)


@pytest.mark.parametrize("action", [[0.0] * 3, [0.0, float("nan")], [float("inf"), 0.0], 0.0])
def test_checked_action_refuses_bad_shapes_and_values(action):
    with pytest.raises(ValueError, match="action"):
        checked_action(np.array(action), 2)


def test_checked_action_leaves_values_alone():
    action = checked_action([1.5, -2.0], 2)
    assert action.dtype == np.float32 and action.tolist() == [1.5, -2.0]


IMAGE, PROPRIO = np.zeros((2, 2, 3), np.uint8), np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({"primary": IMAGE.astype(np.float32), "proprio": PROPRIO}, r"image of 'primary' is float32 \(2, 2, 3\); expected uint8"),
        (
            {"primary": IMAGE, "wrist": IMAGE[0], "proprio": PROPRIO},
            r"image of 'wrist' is uint8 \(2, 3\); expected uint8 \(H, W, 3",
        ),
        ({"primary": IMAGE, "proprio": np.zeros(1)}, r"proprio is float64 \(1,\); expected float32 \(p,\)"),
        ({"primary": IMAGE}, r"observation has \['primary'\]; expected 'proprio' and"),
        ({"proprio": PROPRIO}, r"observation has \['proprio'\]; expected 'proprio' and, by the names of cameras, images"),
    ],
)
def test_observations_of_another_form_are_refused(observation, message):
    with pytest.raises(ValueError, match=message):
        checked_observation(observation)


def test_the_end_of_an_episode_is_told():
    with EnvironmentPool(CountingFactory(limit=2), seeds=[0], num_workers=1) as pool:
        pool.reset()
        ends = [pool.step(np.zeros((1, 2), np.float32), np.ones(1, bool))[1:] for _ in range(2)]
    assert [(success.tolist(), ended.tolist()) for success, ended in ends] == [([False], [False]), ([False], [True])]


def test_what_an_environment_has_to_say_is_named():
    expected = r"seed 4(.|\n)*what reset returns as info has \[\]; expected 'instruction' among them"
    with EnvironmentPool(CountingFactory(breakage="reset"), [4], 1) as pool, pytest.raises(WorkerError, match=expected):
        pool.reset()


def test_a_factory_that_workers_cannot_import_is_an_error_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "vanishing.py").write_text("def make():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    make = importlib.import_module("vanishing").make
    (tmp_path / "vanishing.py").unlink()
    with pytest.raises(WorkerError, match="ModuleNotFoundError: No module named 'vanishing'"):
        EnvironmentPool(make, seeds=[0], num_workers=1)


def test_a_factory_that_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match=r"lambda.*cannot go to worker processes \(.*expected what pickle takes"):
        EnvironmentPool(lambda: None, seeds=[0], num_workers=1)
