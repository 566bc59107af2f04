import threading
import time

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mimic_video.config import ConfigError, PolicyConfig, experiment_from
from mimic_video.policy import strategies
from mimic_video.policy.strategies import (
    Committed,
    Executor,
    SimulatedDelay,
    ThreadPlanner,
    control_loop,
    in_base_frame,
    make_strategy,
)
from mimic_video.transforms import absolute_poses, rot6d_from_matrix

HORIZON = 6


def config(strategy, **fields):
    return PolicyConfig(strategy=strategy, execute_steps=2, **fields)


class Counting:
    """The n-th plan, made at time t, is of actions 100·n + t, 100·n + t + 1, …; keeps when plans begin and what they continue."""

    def __init__(self):
        self.begun, self.committed = [], []

    def __call__(self, now, query, committed=None):
        assert query == len(self.begun)
        self.begun.append(now)
        self.committed.append(committed)
        return np.arange(now, now + HORIZON, dtype=np.float32)[None, :, None] + 100 * query


def drive(strategy, delay, steps, plan=None):
    """What is executed in each step, None for nothing, and the plan that was followed."""
    plan, executed = plan or Counting(), []
    executor = Executor(make_strategy(strategy), plan, SimulatedDelay(delay))
    for now in range(steps):
        action = executor.step(lambda now=now: (now,))
        executed.append(None if action is None else float(action[0, 0]))
    return executed, plan


def test_open_loop_executes_all_of_a_chunk_and_then_waits_for_the_next():
    executed, plan = drive(config("open_loop"), delay=2, steps=12)
    assert executed == [None, None, 0, 1, 2, 3, 4, 5, None, None, 108, 109] and plan.begun == [0, 8]


def test_receding_horizon_executes_the_start_of_a_chunk_and_then_waits_for_the_next():
    assert drive(config("receding_horizon"), delay=1, steps=7)[0] == [None, 0, 1, None, 103, 104, None]
    assert drive(config("receding_horizon"), delay=0, steps=5)[0] == [0, 1, 102, 103, 204]


def test_asynchronous_plans_begin_while_actions_are_left():
    """After the first, no step is without an action, and every action is the one that its plan made for that very time."""
    executed, plan = drive(config("asynchronous"), delay=1, steps=9)
    assert executed == [None, 0, 1, 2, 104, 105, 206, 207, 308] and plan.begun == [0, 3, 5, 7]
    assert plan.committed == [None] * 4


@pytest.mark.parametrize(("strategy", "delay"), [("asynchronous", 0), ("real_time_chunking", 0)])
def test_without_a_delay_asynchronous_plans_are_a_receding_horizon(strategy, delay):
    assert drive(config(strategy), delay, 9)[0] == drive(config("receding_horizon"), delay, 9)[0]


def test_real_time_chunking_continues_the_chunk_in_execution():
    executed, plan = drive(config("real_time_chunking"), delay=2, steps=10)
    assert executed == [None, None, 0, 1, 2, 3, 106, 107, 208, 209] and plan.begun == [0, 4, 6, 8]
    first, *later = plan.committed
    assert first is None
    assert [c.actions[0, :, 0].tolist() for c in later] == [[2, 3, 4, 5], [106, 107, 108, 109], [208, 209, 210, 211]]
    assert [c.delay for c in later] == [2, 2, 2]


def test_the_expected_delay_is_the_longest_of_the_last_ten():
    class Jitter(SimulatedDelay):
        def start(self, plan):
            super().start(plan)
            self._left = next(delays)

    delays, plan = iter([1, 3, *[1] * 20]), Counting()
    executor = Executor(make_strategy(config("real_time_chunking")), plan, Jitter(0))
    for now in range(40):
        executor.step(lambda now=now: (now,))
    assert [c.delay for c in plan.committed[1:14]] == [1, *[3] * 10, 1, 1]


def test_a_plan_begins_early_enough_to_arrive_in_time():
    strategy = PolicyConfig(strategy="real_time_chunking", execute_steps=5)
    executed, plan = drive(strategy, delay=3, steps=30)
    assert executed[:3] == [None] * 3 and None not in executed[3:]
    assert plan.begun[:3] == [0, 6, 9]  # with three actions left, not with one


def test_delays_beyond_a_chunk_leave_gaps_but_no_stale_actions():
    executed, plan = drive(config("real_time_chunking"), delay=8, steps=25)
    assert executed[8:14] == [0, 1, 2, 3, 4, 5] and executed.count(None) > 8
    assert plan.committed[1].delay == len(plan.committed[1].actions[0]) == 6  # all that is left will be executed


def test_temporal_ensembling_is_the_mean_of_all_predictions_with_the_oldest_first():
    decay, plan = 0.5, Counting()
    executed, _ = drive(config("temporal_ensembling", ensemble_decay=decay), 0, 8, plan)
    assert plan.begun == list(range(8))
    weights = np.exp(-decay * np.arange(3))
    assert executed[2] == pytest.approx(2 + 100 * (weights @ [0, 1, 2]) / weights.sum())
    latest = np.exp(-decay * np.arange(HORIZON))  # the two oldest plans have ended before step 7
    assert executed[7] == pytest.approx(7 + 100 * (latest @ np.arange(2, 8)) / latest.sum())


def test_temporal_ensembling_with_a_delay_holds_only_at_the_start():
    executed, plan = drive(config("temporal_ensembling", ensemble_decay=0.0), delay=2, steps=8)
    assert executed[:4] == [None, None, 0, 1] and plan.begun == [0, 2, 4, 6]
    assert executed[4] == pytest.approx((2 + 104) / 2)  # two actions have been executed since either plan's observation


def test_delays_are_not_negative():
    with pytest.raises(ValueError, match="a simulated delay is -1 steps; expected zero or more"):
        SimulatedDelay(-1)


def test_robots_are_driven_side_by_side():
    def plan(now, query, committed=None):
        return np.stack([np.full((HORIZON, 2), robot + now, np.float32) for robot in (0, 10, 20)])

    for name in ("open_loop", "receding_horizon", "temporal_ensembling", "asynchronous", "real_time_chunking"):
        executor = Executor(make_strategy(config(name)), plan, SimulatedDelay(0))
        for _ in range(4):
            action = executor.step(lambda: (0,))
        assert action.shape == (3, 2) and action.dtype == np.float32 and action[:, 0].tolist() == [0, 10, 20], name


def test_a_slow_plan_in_a_thread_does_not_stop_the_robot():
    """It goes on executing the chunk it has, and then the new one from the action on that is due by then."""
    counting, may_end, threads, executed = Counting(), threading.Semaphore(1), set(), []

    def slow(*arguments):
        threads.add(threading.current_thread().name)
        assert may_end.acquire(timeout=60)
        return counting(*arguments)

    with ThreadPlanner() as planner:
        executor = Executor(make_strategy(PolicyConfig(strategy="real_time_chunking", execute_steps=1)), slow, planner)

        def step():
            action = executor.step(lambda: (len(executed),))
            if action is not None:
                executed.append(float(action[0, 0]))
            time.sleep(0.001)

        def step_until(condition):
            deadline = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < deadline
                step()

        step_until(lambda: executed)
        for _ in range(3):
            step()
        assert executed == [0, 1, 2, 3]  # while the second plan is being made
        may_end.release()
        step_until(lambda: executed[-1] >= 100)
        may_end.release()  # of the third, that the thread may end
    assert [action % 100 for action in executed] == list(range(len(executed)))  # each at the time that it was planned for
    assert threads == {"planner_0"}
    assert counting.committed[1].actions[0, :, 0].tolist() == [1, 2, 3, 4, 5]


def test_what_a_plan_raises_in_its_thread_reaches_the_control_loop():
    def broken(*_):
        raise ZeroDivisionError("the policy broke")

    with ThreadPlanner() as planner:
        executor = Executor(make_strategy(config("asynchronous")), broken, planner)
        with pytest.raises(ZeroDivisionError, match="the policy broke"):
            for _ in range(1000):
                executor.step(lambda: (0,))
                time.sleep(0.001)


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_late_step_is_counted_and_no_later_one_is_rushed(monkeypatch):
    clock, starts = Clock(), []
    monkeypatch.setattr(strategies, "time", clock)

    def step():
        starts.append(clock.now)
        clock.sleep(0.05 if len(starts) == 3 else 0.001)

    assert control_loop(step, 50.0, 6) == 1
    np.testing.assert_allclose(np.diff(starts), [0.02, 0.02, 0.05, 0.02, 0.02])


def poses(random, *shape):
    rotation = Rotation.random(int(np.prod(shape)), rng=random).as_matrix().reshape(*shape, 3, 3)
    return np.concatenate([random.normal(size=(*shape, 3)), rot6d_from_matrix(rotation), np.ones((*shape, 1))], -1).astype("f4")


def test_poses_seen_from_the_hand_are_continued_in_the_base_frame():
    """The same pose in space is another one seen from where the hand is by now."""
    random, seen = np.random.default_rng(0), []
    before, now, relative = poses(random, 2), poses(random, 2), poses(random, 2, HORIZON)

    def plan(images, proprio, instructions, query, *committed):
        seen.extend(committed)
        return relative

    absolute = in_base_frame(plan)
    chunk = absolute(None, before, None, 0)
    np.testing.assert_allclose(chunk, absolute_poses(before[:, None], relative), atol=1e-6)
    absolute(None, now, None, 1, Committed(chunk[:, 2:], 1))
    np.testing.assert_allclose(absolute_poses(now[:, None], seen[0].actions), chunk[:, 2:], atol=1e-5)
    assert seen[0].delay == 1 and np.abs(seen[0].actions - relative[:, 2:]).max() > 0.1


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("strategy", "sometimes", "policy.strategy.*is 'sometimes'; expected one of 'open_loop'"),
        ("execute_steps", 4, "policy.execute_steps' is 4; expected less than data.action_horizon=4"),
        ("guidance_clip", 0.0, "guidance_clip' is 0.0; expected a positive number"),
        ("ensemble_decay", -1.0, "policy.ensemble_decay' is -1.0; expected zero or more"),
    ],
)
def test_settings_that_make_no_sense_are_named(field, value, complaint):
    policy = {"strategy": "real_time_chunking", "execute_steps": 2, field: value}
    with pytest.raises(ConfigError, match=complaint):
        experiment_from({"data": {"action_horizon": 4}, "policy": policy})
