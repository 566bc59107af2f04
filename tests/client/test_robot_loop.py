import dataclasses
import logging

import numpy as np
import pytest
from serving import LAYOUT, OtherServer, Recorder, serving

from mimic_video_client.execution import ActionTooFar, limit_step, resample_actions
from mimic_video_client.robot_loop import LoopSettings, main, run_robot


def test_targets_are_interpolated_between():
    chunk = np.array([[0.0, 10.0], [1.0, 20.0], [3.0, 20.0]])
    faster = resample_actions(chunk, 10.0, 20.0)
    np.testing.assert_allclose(faster, [[0, 10], [0.5, 15], [1, 20], [2, 20], [3, 20]])
    np.testing.assert_allclose(resample_actions(chunk, 10.0, 10.0), chunk)
    np.testing.assert_allclose(resample_actions(chunk, 10.0, 25.0)[:, 0], [0, 0.4, 0.8, 1.4, 2.2, 3.0])
    np.testing.assert_allclose(resample_actions(chunk[:1], 10.0, 30.0), chunk[:1])
    with pytest.raises(ValueError, match=r"actions have shape \(0, 2\)"):
        resample_actions(chunk[:0], 10.0, 10.0)


def test_what_has_two_values_is_the_nearest_actions():
    chunk = np.array([[0.0, -0.98], [1.0, 1.01], [2.0, 0.99], [3.0, -1.0]])
    got = resample_actions(chunk, 10.0, 40.0, two_valued=[1])
    np.testing.assert_allclose(got[:, 0], np.arange(13) / 4)
    np.testing.assert_array_equal(got[:, 1], chunk[[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3], 1])  # the earlier of two as near
    for hz in (10.0, 30.0, 5.0):
        assert set(resample_actions(chunk, 10.0, hz, [1])[:, 1]) <= set(chunk[:, 1])
    for wrong in ([2], [-1], [0.5]):
        with pytest.raises(ValueError, match=r"two_valued is \[.*\]; expected dimensions of 0 to 1"):
            resample_actions(chunk, 10.0, 20.0, wrong)


def test_a_command_that_is_too_far(caplog):
    last, limits = np.array([1.0, 1.0]), np.array([0.1, 1.0])
    near = np.array([1.1, 0.5])
    np.testing.assert_array_equal(limit_step(near, last, limits, "error"), near)
    far = np.array([0.5, 5.0])
    with pytest.raises(ActionTooFar, match=r"joint 0 would move by -0\.5; its limit is 0\.1"):
        limit_step(far, last, limits, "error")
    assert not caplog.records
    np.testing.assert_allclose(limit_step(far, last, limits, "limit"), [0.9, 2.0])
    assert [record.message for record in caplog.records] == ["joint 0 would move by -0.5; its limit is 0.1: limited"]
    for excess in ("error", "limit"):
        with pytest.raises(ActionTooFar, match="is not finite"):
            limit_step(np.array([np.nan, 0]), last, limits, excess)
    for wrong in ((far[:1], last, 0.1), (far, last, 0.0), (far, last, np.ones(3))):
        with pytest.raises(ValueError, match="expected equal shapes, and one positive limit or one for each joint"):
            limit_step(*wrong, "limit")


class Arm:
    """Records what it was told, and when; its picture and state show how often it was looked at."""

    def __init__(self, clock):
        self.clock, self.looks, self.commands = clock, 0, []

    def observe(self):
        self.looks += 1
        image = np.full((*LAYOUT.image_size, 3), self.looks, np.uint8)
        return {"observation.images.primary": image, "observation.state": np.full(3, self.looks, np.float32)}

    def position(self):
        return np.zeros(LAYOUT.action_dim)

    def act(self, action):
        self.commands.append((self.clock.now, action))


class Clock:
    """Time that passes only in sleep, and in planning by as much as `planning`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        self.now += 1e-4  # looking takes time, too
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_the_loop_looks_at_the_policys_rate_and_commands_at_the_robots():
    clock, recorder = Clock(), Recorder()
    arm = Arm(clock)
    with serving(recorder) as running, running.client() as client:
        run_robot(client, arm, "a", LoopSettings("targets", 1e9, "error", robot_hz=20.0), 0.8, clock, clock.sleep)
    assert arm.looks == 8 and len(arm.commands) == 16  # planned at looks 1, 3, 5, 7: two actions of each chunk are executed
    times = np.array([time for time, _ in arm.commands])
    np.testing.assert_allclose(np.diff(times), 0.05, atol=2e-3)
    frames = [action.tolist() for _, action in arm.commands[8:12]]  # of the third plan: frames at looks 1 to 5, then the state
    assert frames == [[1, 2, 3, 4, 5], [3, 3.5, 4, 2, 2.5], [5, 5, 5, 0, 0], pytest.approx(frames[3])]


def test_the_loop_does_not_interpolate_what_the_server_says_has_two_values():
    clock = Clock()
    arm = Arm(clock)
    layout = dataclasses.replace(LAYOUT, two_valued=(0,))
    with serving(Recorder(), layout=layout) as running, running.client() as client:
        assert client.metadata["action"]["two_valued"] == [0]
        run_robot(client, arm, "a", LoopSettings("targets", 1e9, "error", robot_hz=20.0), 0.2, clock, clock.sleep)
    assert arm.commands[1][1].tolist() == [1, 1, 1, 0.5, 0.5]  # between the frames, all 1, and the state, of three numbers


def test_the_loop_ends_at_a_command_that_is_too_far_or_limits_it(caplog):
    for excess in ("error", "limit"):
        clock = Clock()
        arm = Arm(clock)
        with serving(Recorder()) as running, running.client() as client:
            settings = LoopSettings("targets", 0.25, excess)
            if excess == "error":
                with pytest.raises(ActionTooFar, match=r"joint 0 would move by 1; its limit is 0\.25"):
                    run_robot(client, arm, "a", settings, 1.0, clock, clock.sleep)
                assert arm.commands == []
            else:
                with caplog.at_level(logging.WARNING):
                    run_robot(client, arm, "a", settings, 0.2, clock, clock.sleep)
                np.testing.assert_allclose([action[0] for _, action in arm.commands], [0.25, 0.5])
                assert caplog.text.count("limited") == 2


def test_rates_that_do_not_fit():
    with pytest.raises(ValueError, match="robot_hz is 15; expected a whole multiple of the policy's 10 Hz"):
        LoopSettings("targets", 1.0, "error", 15.0).commands_per_action(10.0)
    with pytest.raises(ValueError, match="displacements cannot be interpolated"):
        LoopSettings("displacements", 1.0, "error", 20.0).commands_per_action(10.0)


def test_a_dry_run_from_the_command_line(capsys):
    common = ["--prompt=a", "--actions=displacements", "--max_step=1e9,1e9,1e9,1e9,1e9", "--excess=error"]
    with serving(Recorder()) as running:
        main([f"--server=ws://{running.address}", *common, "--dry_run", "--seconds=0.3"])
        assert capsys.readouterr().out.count("would do [") == 3
        with pytest.raises(SystemExit, match="error: --robot=no_such_module:make: expected MODULE:FUNCTION, but No module named"):
            main([f"--server=ws://{running.address}", *common, "--robot=no_such_module:make"])
    with pytest.raises(SystemExit):
        main(["--server=ws://127.0.0.1:1", *common])
    assert "expected --robot=MODULE:FUNCTION, or --dry_run" in capsys.readouterr().err


@pytest.mark.parametrize("robot", ["--dry_run", "--robot=serving:Recorder"])
def test_a_server_that_tells_no_rates_as_openpis_do_not(robot):
    arguments = ["--prompt=a", "--actions=displacements", "--max_step=1", "--excess=error", robot]
    told = r"error: the server tells \['reset_pose'\] of its policy; expected \[.*'action'.*\], as a server of mimic-video tells"
    with OtherServer({"reset_pose": [0.0]}) as uri, pytest.raises(SystemExit, match=told):
        main([f"--server={uri}", *arguments])


def test_a_proxy_that_is_none():
    arguments = [
        "--server=ws://127.0.0.1:9",
        "--prompt=a",
        "--actions=displacements",
        "--max_step=1",
        "--excess=error",
        "--dry_run",
    ]
    with pytest.raises(SystemExit, match="error: 'ftp://lab' is not a proxy; expected http://HOST:PORT"):
        main([*arguments, "--proxy=ftp://lab"])
