import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
from counting import CountingFactory
from recordings import read, series

from mimic_video.config import experiment_from
from mimic_video.evaluation.environment import EnvironmentPool, WorkerError
from mimic_video.evaluation.rollouts import (
    EpisodeResult,
    log_recordings,
    run_rollouts,
    run_task,
    success_table,
    wilson_interval,
    write_recordings,
)
from mimic_video.media import read_frames
from mimic_video.rerun_log import RerunLog


def _config(tasks=("easy",), episodes=3, max_steps=10, execute_steps=2, **data):
    return experiment_from(
        {
            "data": {"past_frames": 5, "video_hz": 10.0, "control_hz": 20.0, **data},
            "policy": {"execute_steps": execute_steps},
            "evaluation": {
                "tasks": tasks,
                "episodes_per_task": episodes,
                "first_seed": 100,
                "max_steps": max_steps,
                "workers": 2,
            },
        }
    )


def _factory_for(task):
    return CountingFactory(goal={"easy": 3.0, "hard": 1000.0}[task])


class SeedAsSpeed:
    """Plans actions that add up to (seed − 99) at every step, and remembers what it was shown."""

    def __init__(self, horizon=3):
        self.horizon = horizon
        self.calls = []

    def __call__(self, images, proprio, instructions, query_index):
        self.calls.append((images, proprio, instructions, query_index))
        actions = np.zeros((len(proprio), self.horizon, 2), np.float32)
        actions[..., 0] = (proprio[:, 0] - 99)[:, None]
        return actions


def test_episodes_end_at_success_or_at_the_limit():
    results = run_rollouts(SeedAsSpeed(), _factory_for, _config(tasks=("easy", "hard")))
    assert [(r.task, r.seed, r.success, r.steps) for r in results] == [
        ("easy", 100, True, 3),
        ("easy", 101, True, 2),
        ("easy", 102, True, 1),
        ("hard", 100, False, 10),
        ("hard", 101, False, 10),
        ("hard", 102, False, 10),
    ]
    assert multiprocessing.active_children() == []


def test_the_plan_is_called_every_execute_steps_with_a_constant_batch():
    plan = SeedAsSpeed()
    run_rollouts(plan, _factory_for, _config())
    assert [query_index for *_, query_index in plan.calls] == [0, 1]  # before steps 0 and 2; all are done after step 3
    for images, proprio, instructions, _ in plan.calls:
        assert list(images) == ["primary"]
        assert images["primary"].shape == (3, 5, 2, 2, 3) and images["primary"].dtype == np.uint8
        assert proprio.shape == (3, 4) and proprio.dtype == np.float32
        assert instructions == ["count"] * 3
    assert plan.calls[1][1][:, 2].tolist() == [2, 2, 1]  # the third episode succeeded at its first step and stood still


def test_the_history_is_cut_at_the_video_rate():
    plan = SeedAsSpeed()
    run_rollouts(plan, _factory_for, _config(tasks=("hard",)))
    histories = [images["primary"][0, :, 0, 0, 0].tolist() for images, *_ in plan.calls]
    assert histories[:2] == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 2]]
    assert histories[4] == [0, 2, 4, 6, 8]


def test_each_action_of_a_chunk_is_executed_in_its_turn():
    def plan(images, proprio, instructions, query_index):
        chunk = np.array([[1, 0], [10, 0], [100, 0]], np.float32) * (1 if query_index == 0 else 1000)
        return np.repeat(chunk[None], len(proprio), axis=0)

    totals = []

    def spy(images, proprio, instructions, query_index):
        totals.append(float(proprio[0, 1]))
        return plan(images, proprio, instructions, query_index)

    run_rollouts(spy, lambda task: CountingFactory(goal=1e9), _config(max_steps=5))
    assert totals == [0, 11, 11_011]  # two of the chunk's three actions are used


def test_only_the_first_episodes_are_recorded():
    results = run_rollouts(SeedAsSpeed(), _factory_for, _config(), record=2)
    assert [frame[0, 0, 0] for frame in results[0].frames["primary"]] == [0, 1, 2, 3]
    assert [frame[0, 0, 0] for frame in results[1].frames["primary"]] == [0, 1, 2]
    assert results[2].frames is None


def test_an_episode_that_the_simulator_ends_has_failed():
    results = run_rollouts(SeedAsSpeed(), lambda task: CountingFactory(goal=5.0, limit=2), _config())
    assert [(r.success, r.steps) for r in results] == [(False, 2), (False, 2), (True, 2)]


def test_recordings_are_named_by_outcome_and_show_all_cameras(tmp_path):
    views = {"primary": np.zeros((2, 4, 4, 3), np.uint8), "wrist": np.full((2, 8, 8, 3), 255, np.uint8)}
    results = [EpisodeResult("a", 7, True, 1, frames=views), EpisodeResult("a", 8, False, 1)]
    write_recordings(results, tmp_path, 20.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a_7_success.gif"]
    shown = read_frames(tmp_path / "a_7_success.gif", 20.0, 2)
    assert len(shown) == 2 and shown.shape[1] == 2 * shown.shape[2]  # of the first one's size, one above the other
    assert not shown[:, : shown.shape[2]].any() and (shown[:, shown.shape[2] :] == 255).all()


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 2, 3), (2, 2, 2), (3, 2)])
def test_a_plan_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"easy: the plan has shape .* expected \(3, 2 or more, 2\)"):
        run_rollouts(lambda *_: np.zeros(shape, np.float32), _factory_for, _config())
    assert multiprocessing.active_children() == []


def test_a_plan_with_nan_is_an_error_that_names_the_seed():
    with pytest.raises(WorkerError, match="seed 100"):
        run_rollouts(lambda *_: np.full((3, 2, 2), np.nan, np.float32), _factory_for, _config())


def test_rates_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"easy is controlled at 20 Hz, but data.control_hz=5"):
        run_rollouts(SeedAsSpeed(), _factory_for, _config(control_hz=5.0))


def test_no_tasks_is_an_error():
    with pytest.raises(ValueError, match=r"evaluation\.tasks is empty"):
        run_rollouts(SeedAsSpeed(), _factory_for, _config(tasks=()))


def test_actions_and_proprioception_of_every_step_are_kept():
    fast = run_rollouts(SeedAsSpeed(), _factory_for, _config())[1]
    assert fast.steps == 2 and fast.actions.tolist() == [[2, 0], [2, 0]]
    assert fast.proprio[:, 1].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("strategy", "executed"),
    [
        ("receding_horizon", [0.5, 0.5, 1, 1, 0.5, 0.5, 1, 1]),
        ("real_time_chunking", [0.5, 0.5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_robots_hold_while_a_plan_is_made_and_nothing_is_left(strategy, executed):
    """Half an action stands for holding here."""
    config, committed, last_seen = _config(tasks=("hard",), max_steps=8), [], []
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, strategy=strategy))

    def plan(images, proprio, instructions, query_index, *more):
        committed.append(more)
        return np.full((3, 6, 2), 1, np.float32)

    def hold(last, robots):
        last_seen.append(last)
        return np.full((robots, 2), 0.5, np.float32)

    with EnvironmentPool(_factory_for("hard"), (1, 2, 3), 1) as pool:
        results = run_task(plan, pool, "hard", config, delay=2, hold=hold)
        assert [result.actions[:, 0].tolist() for result in results] == [executed] * 3
        assert last_seen[0] is None and last_seen[1].tolist() == [[0.5, 0.5]] * 3
        assert committed[0] == () and bool(committed[1]) == (strategy == "real_time_chunking")
        with pytest.raises(ValueError, match="robots have to hold still while a plan is made: pass `hold`"):
            run_task(plan, pool, "hard", config, delay=1)


def test_wilson_interval_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError):
        wilson_interval(successes, trials)


def test_success_table_pools_the_tasks():
    results = [EpisodeResult("a", 0, True, 4), EpisodeResult("a", 1, False, 9), EpisodeResult("b", 0, True, 2)]
    table = success_table(results)
    assert list(table) == ["a", "b", "overall"]
    assert (table["a"]["successes"], table["a"]["episodes"], table["a"]["rate"]) == (1, 2, 0.5)
    assert table["overall"]["rate"] == pytest.approx(2 / 3)
    assert (table["overall"]["low"], table["overall"]["high"]) == wilson_interval(2, 3)
    assert json.loads(json.dumps(table)) == table


def test_recorded_episodes_keep_their_plans():
    """What was planned for them, and when; of two steps, the last plan of a task may be beyond the end of an episode."""
    results = run_rollouts(SeedAsSpeed(horizon=3), _factory_for, _config(), record=2)
    assert [[plan.step for plan in result.plans] for result in results] == [[0, 2], [0], []]
    for result, speed in zip(results[:2], (1.0, 2.0), strict=True):
        assert result.instruction == "count"
        for plan in result.plans:
            np.testing.assert_array_equal(plan.actions, [[speed, 0.0]] * 3)
            assert plan.committed is None and plan.seconds > 0


def test_in_real_time_chunking_plans_say_what_they_continued():
    config = _config(max_steps=4, execute_steps=2)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, strategy="real_time_chunking"))
    plan = SeedAsSpeed(horizon=5)
    with EnvironmentPool(CountingFactory(goal=1000.0), [100, 101], 1) as pool:
        results = run_task(lambda *arguments: plan(*arguments[:4]), pool, "hard", config, record=1)
    first, *later = results[0].plans
    assert first.committed is None and later and not results[1].plans
    for each in later:
        np.testing.assert_array_equal(each.committed, [[1.0, 0.0]] * len(each.committed))
        assert len(each.committed) >= 1


@pytest.mark.reference
def test_recorded_episodes_in_a_recording_of_rerun(tmp_path):
    config = _config()
    results = run_rollouts(SeedAsSpeed(horizon=3), _factory_for, config, record=2)
    with RerunLog(str(tmp_path / "a.rrd"), "test") as log:
        log_recordings(log, results, config)
    found = read(tmp_path / "a.rrd")
    assert {name.rpartition("easy/")[2].partition("/")[0] for name in found} == {"100", "101"}
    for result in results[:2]:
        place = f"easy/{result.seed}"
        for name, expected in (("actions", result.actions), ("proprio", result.proprio)):
            times, values = series(found[f"{place}/{name}"])
            np.testing.assert_array_equal(values, expected)
            np.testing.assert_allclose(times, np.arange(len(expected)) / 20.0, atol=1e-8)
        assert len(found[f"{place}/camera/primary"]) == result.steps + 1
        times, values = series(found[f"{place}/plans/0"])
        np.testing.assert_array_equal(values, result.plans[0].actions)
        times, values = series(found[f"{place}/latency_ms"])
        np.testing.assert_allclose(values[:, 0], [1e3 * plan.seconds for plan in result.plans])
        np.testing.assert_allclose(times, [plan.step / 20.0 for plan in result.plans], atol=1e-8)
        assert found[f"{place}/instruction"] == [(0.0, {"text": ["count"]})]
        assert found[f"{place}/outcome"] == [(result.steps / 20.0, {"text": ["success"]})]
