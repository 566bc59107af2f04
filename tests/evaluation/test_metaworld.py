import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from counting import CountingEnvironment, CountingFactory

from data_pipelines.sources.experts import demonstrations
from data_pipelines.workers import worker_processes
from mimic_video.config import ConfigError, experiment_from
from mimic_video.evaluation.environment import EnvironmentPool
from mimic_video.evaluation.metaworld import (
    INSTRUCTIONS,
    MetaworldFactory,
    from_delta,
    to_delta,
)
from mimic_video.evaluation.rollouts import run_rollouts

pytestmark = pytest.mark.simulator

DRAWER = MetaworldFactory("drawer-open-v3", (64, 64))
BUTTON = MetaworldFactory("button-press-topdown-v3", (48, 80))


@pytest.fixture(scope="module", autouse=True)
def graphics():
    DRAWER()  # settles how MuJoCo draws before a test imports metaworld by itself


def _episode(environment, seed, steps=3):
    """(steps + 1, H, W, 3) images and (steps + 1, 39) states under fixed actions."""
    observation, _ = environment.reset(seed=seed)
    images, states = [observation["primary"]], [environment.state]
    for action in np.random.default_rng(0).uniform(-1, 1, (steps, 4)):
        observation, *_ = environment.step(action)
        images.append(observation["primary"])
        states.append(environment.state)
    return np.stack(images), np.stack(states)


def test_every_task_has_an_instruction():
    from metaworld.policies import ENV_POLICY_MAP

    assert set(INSTRUCTIONS) == set(ENV_POLICY_MAP)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="'draw-open'; did you mean 'drawer-open-v3'"):
        MetaworldFactory("draw-open", (64, 64))


def test_an_unknown_layout_is_refused():
    with pytest.raises(ConfigError, match=r"'evaluation.layout' is 'joints'; expected one of native, delta"):
        MetaworldFactory("drawer-open-v3", (64, 64), "joints")


def test_pose_vectors_drive_the_same_robot():
    native, delta = DRAWER(), dataclasses.replace(DRAWER, layout="delta")()
    assert delta.action_space.shape == delta.observation_space["proprio"].shape == (10,)
    first, second = native.reset(seed=3)[0], delta.reset(seed=3)[0]
    for action in np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32):
        np.testing.assert_array_equal(second["proprio"][[0, 1, 2, 9]], first["proprio"])
        np.testing.assert_array_equal(second["proprio"][3:9], [1, 0, 0, 0, 1, 0])
        np.testing.assert_array_equal(second["primary"], first["primary"])
        vector = to_delta(action)
        np.testing.assert_allclose(vector[:3], action[:3] * 0.04, rtol=1e-6)  # metres in a control step
        np.testing.assert_allclose(from_delta(vector), action, atol=1e-6)
        assert 0 <= vector[9] <= 1 and (vector[9] < 0.5) == (action[3] > 0)  # force closes
        (first, *_), (second, *_) = native.step(action), delta.step(vector)
    np.testing.assert_allclose(delta.state, native.state, atol=1e-6)


def test_several_cameras_of_one_scene():
    cameras = ("primary", "secondary", "wrist")
    environment, alone = dataclasses.replace(DRAWER, cameras=cameras)(), DRAWER()
    before = environment.reset(seed=0)[0]
    np.testing.assert_array_equal(before["primary"], alone.reset(seed=0)[0]["primary"])
    after = environment.step(np.array([0, 0, -1, 0], np.float32))[0]
    assert list(after) == [*cameras, "proprio"]
    changes = [np.abs(np.float32(after[camera]) - before[camera]).mean() for camera in cameras]
    assert min(changes) > 0.5 and max(changes) == changes[2]  # the wrist's camera moves, the others see an arm that does
    with pytest.raises(ValueError, match=r"cameras are \('gripper',\); expected some of primary, secondary, wrist"):
        dataclasses.replace(DRAWER, cameras=("gripper",))


def test_observation_and_rates():
    environment = DRAWER()
    observation, info = environment.reset(seed=0)
    assert info == {"instruction": "open the drawer"}
    assert environment.metadata["render_fps"] == pytest.approx(20)
    image, proprio = observation["primary"], observation["proprio"]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert proprio.shape == (4,) and proprio.dtype == np.float32
    moved, *_ = environment.step(np.array([0, 0, 1, 1], np.float32))
    assert moved["proprio"][2] > proprio[2] + 0.005  # the gripper rises
    for _ in range(5):
        moved, _, terminated, truncated, info = environment.step(np.array([0, 0, 1, 1], np.float32))
    assert moved["proprio"][3] < proprio[3] - 0.1  # and closes
    assert info["success"] is terminated is truncated is False


@pytest.mark.filterwarnings("error")
def test_the_interface_is_that_of_gymnasium():
    from gymnasium.utils import passive_env_checker as checker

    environment = dataclasses.replace(DRAWER, cameras=("primary", "wrist"))()
    checker.check_space(environment.action_space, "action", checker.check_action_space)
    checker.check_space(environment.observation_space, "observation", checker.check_observation_space)
    checker.env_reset_passive_checker(environment, seed=0)
    checker.env_step_passive_checker(environment, np.zeros(4, np.float32))


def gymnasium_counter():
    """A subclass of gymnasium's Env, in one of its wrappers: after two steps an episode is over."""
    import gymnasium

    class Counter(CountingEnvironment, gymnasium.Env):
        pass

    return gymnasium.wrappers.TimeLimit(Counter(CountingFactory()), 2)


def test_environments_of_gymnasium_are_used_as_they_are():
    with EnvironmentPool(gymnasium_counter, seeds=[5], num_workers=1) as pool:
        observation, instructions = pool.reset()
        assert (observation["proprio"][0, 0], instructions, pool.control_hz) == (5, ["count"], 20.0)
        assert [pool.step(np.zeros((1, 2), np.float32), np.ones(1, bool))[2].item() for _ in range(2)] == [False, True]


def test_images_are_upright_and_in_rgb_order():
    image = DRAWER().reset(seed=0)[0]["primary"].astype(int)
    red_arm = (image[..., 0] > 100) & (image[..., 1] < 60) & (image[..., 2] < 60)
    green_drawer = (image[..., 1] > image[..., 0] + 20) & (image[..., 1] > image[..., 2] + 20)
    rows, columns = np.nonzero(red_arm)
    assert len(rows) > 50 and rows.mean() < 25 and columns.mean() < 32  # the arm reaches in from the top left
    assert green_drawer.sum() > 100 and np.nonzero(green_drawer)[1].mean() > 32  # towards the drawer on the right


def test_interleaved_environments_render_and_simulate_as_if_alone():
    drawers, button = [DRAWER(), DRAWER()], BUTTON()
    alone = [_episode(DRAWER(), seed) for seed in (1, 2)] + [_episode(BUTTON(), 3)]
    observations = [drawers[0].reset(seed=1)[0], drawers[1].reset(seed=2)[0], button.reset(seed=3)[0]]
    for step, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (3, 4))):
        for (images, _), observation in zip(alone, observations, strict=True):
            np.testing.assert_array_equal(observation["primary"], images[step])
        observations = [environment.step(action)[0] for environment in (*drawers, button)]
    for (images, states), environment in zip(alone, (*drawers, button), strict=True):
        np.testing.assert_array_equal(environment.state, states[-1])
        assert (images[0] != images[-1]).any()
    assert (alone[0][0] != alone[1][0]).any()


def test_an_episode_does_not_depend_on_the_ones_before():
    used = DRAWER()
    _episode(used, 1)
    for again, fresh in zip(_episode(used, 2), _episode(DRAWER(), 2), strict=True):
        np.testing.assert_array_equal(again, fresh)


def test_the_first_image_shows_the_drawer_where_the_episode_has_it():
    environment = DRAWER()
    first, _ = environment.reset(seed=3)
    state = environment.state
    still, *_ = environment.step(np.array([0, 0, 0, -1], np.float32))
    assert np.abs(state[4:7] - environment.state[4:7]).max() < 0.005  # the handle, metres
    assert (np.abs(first["primary"].astype(int) - still["primary"]).max(axis=-1) > 40).mean() < 0.02


def test_images_are_the_same_in_a_process_with_a_single_environment():
    program = (
        "import sys; from mimic_video.evaluation.metaworld import MetaworldFactory\n"
        "observation, _ = MetaworldFactory('drawer-open-v3', (64, 64))().reset(seed=11)\n"
        "sys.stdout.buffer.write(observation['primary'].tobytes())"
    )
    alone = _run(program).stdout
    with EnvironmentPool(DRAWER, seeds=[10, 11, 12], num_workers=2) as pool:
        images = pool.reset()[0]["primary"]
    assert images[1].tobytes() == alone == DRAWER().reset(seed=11)[0]["primary"].tobytes()


def test_graphics_that_can_no_longer_be_chosen_are_an_error():
    program = (
        "import mujoco; from mimic_video.evaluation.metaworld import MetaworldFactory\nMetaworldFactory('reach-v3', (64, 64))()"
    )
    finished = _run(program)
    assert finished.returncode == 1 and b"set MUJOCO_GL=osmesa" in finished.stderr


@pytest.mark.parametrize("backend", ["glfw", "vulkan", "off"])  # without a display; not known to MuJoCo; no graphics
def test_graphics_that_do_not_work_are_named(backend, monkeypatch):
    """From a worker of a pool and from one that makes demonstrations; neither has a traceback."""
    monkeypatch.setenv("MUJOCO_GL", backend)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    message = f"^environment variable MUJOCO_GL is '{backend}', and MuJoCo cannot render with that here .*; expected osmesa .*$"
    with pytest.raises(ConfigError, match=message):
        EnvironmentPool(DRAWER, seeds=[0], num_workers=1)
    with worker_processes(1) as workers, pytest.raises(ConfigError, match=message):
        next(demonstrations(DRAWER, "drawer", [0], workers))


def test_a_missing_package_names_the_extra():
    program = (
        "import sys; sys.modules['metaworld'] = None\n"
        "from mimic_video.evaluation.metaworld import MetaworldFactory\n"
        "MetaworldFactory('reach-v3', (64, 64))()"
    )
    finished = _run(program)
    assert finished.returncode == 1 and b"pip install 'mimic-video-jax[sim]'" in finished.stderr


@pytest.mark.parametrize("action", [[0.0, 0.0, 0.0], [0.0, 0.0, float("nan"), 0.0]])
def test_bad_actions_are_refused(action):
    environment = DRAWER()
    environment.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        environment.step(np.array(action, np.float32))


def test_actions_saturate_at_one():
    states = []
    for size in (1.0, 5.0):
        environment = DRAWER()
        environment.reset(seed=0)
        environment.step(np.full(4, size, np.float32))
        states.append(environment.state)
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("layout", ["native", "delta"])
def test_a_hand_that_holds_stays_and_keeps_its_grip(layout):
    factory = MetaworldFactory("drawer-open-v3", (16, 16), layout)
    environment = factory()
    environment.reset(seed=3)
    closing = np.float32([0.3, -0.2, 0.1, 0.8])
    last = closing if layout == "native" else to_delta(closing)
    for _ in range(4):
        environment.step(last)
    held = factory.hold(last[None], 1)
    for _ in range(10):
        observation, *_ = environment.step(held[0])
    settled = factory.positions(observation["proprio"][None])
    native = held[0] if layout == "native" else from_delta(held[0])
    np.testing.assert_allclose(native, [0, 0, 0, 0.8], atol=1e-6)
    for _ in range(10):
        observation, *_ = environment.step(held[0])
    np.testing.assert_allclose(observation["proprio"][None, :3], settled, atol=2e-3)
    assert factory.hold(None, 2).shape == (2, len(last))


def test_commanded_positions_in_metres():
    actions = np.float32([[1, 0, -0.5, 0.3], [3, -0.25, 0, 0.3]])  # the controller saturates at 1
    expected = [[0.04, 0, -0.02], [0.08, -0.01, -0.02]]
    np.testing.assert_allclose(DRAWER.commanded_positions(actions), expected, atol=1e-7)
    delta = dataclasses.replace(DRAWER, layout="delta")
    np.testing.assert_allclose(delta.commanded_positions(to_delta(actions)), expected, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Constant")
def test_scripted_experts_succeed_through_the_rollouts():
    from metaworld.policies import ENV_POLICY_MAP

    experts = {INSTRUCTIONS[task]: ENV_POLICY_MAP[task]() for task in ("drawer-open-v3", "reach-v3")}

    def plan(images, proprio, instructions, query_index):
        rows = zip(instructions, proprio.astype(np.float64), strict=True)
        return np.stack([np.clip(experts[text].get_action(state), -1, 1)[None] for text, state in rows]).astype(np.float32)

    config = experiment_from(
        {
            "data": {"past_frames": 1, "video_hz": 20.0, "control_hz": 20.0},
            "policy": {"execute_steps": 1},
            "evaluation": {"tasks": ("drawer-open-v3", "reach-v3"), "episodes_per_task": 3, "max_steps": 60},
        }
    )
    results = run_rollouts(plan, StateFactory, config, record=1)
    assert [result.success for result in results] == [True] * 6
    assert results[0].frames["primary"].shape == (results[0].steps + 1, 64, 64, 3)
    assert len({result.steps for result in results}) > 1


@dataclasses.dataclass(frozen=True)
class StateFactory:
    """Environments whose proprioception is the simulator's full state, which scripted experts need."""

    task: str

    def __call__(self):
        return StateEnvironment(MetaworldFactory(self.task, (64, 64))())


class StateEnvironment:
    def __init__(self, environment):
        self._environment = environment
        self.action_space, self.metadata = environment.action_space, environment.metadata
        self.close = environment.close

    def reset(self, **options):
        return self._with_state(*self._environment.reset(**options))

    def step(self, action):
        return self._with_state(*self._environment.step(action))

    def _with_state(self, observation, *rest):
        return observation | {"proprio": self._environment.state.astype(np.float32)}, *rest


def _run(program):
    """Runs Python code in a process that imports as this one does, but has made no choice of graphics."""
    variables = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, env=variables)
