import pathlib
import subprocess
import sys

import numpy as np
import pytest
from counting import CountingFactory
from serving import serving

from mimic_video.config import experiment_from
from mimic_video.evaluation.rollouts import run_rollouts
from mimic_video.evaluation.served import ConnectionPerEpisodePlan, LockstepPlan
from mimic_video.policy.observations import PolicyLayout

EPISODES = 3
LAYOUT = PolicyLayout(
    embodiment="counter",
    cameras=("primary",),
    image_size=(2, 2),
    past_frames=5,
    video_hz=10.0,
    proprio_dim=4,
    action_dim=2,
    action_horizon=4,
    control_hz=20.0,
    execute_steps=2,
)
CONFIG = experiment_from(
    {
        "data": {"past_frames": 5, "video_hz": 10.0, "control_hz": 20.0},
        "policy": {"execute_steps": 2},
        "evaluation": {"tasks": ("count",), "episodes_per_task": EPISODES, "first_seed": 100, "max_steps": 10, "workers": 1},
    }
)


class FrameCounter:
    """Acts by the frames that it sees and by the seed; remembers the frames by seed."""

    def __init__(self):
        self.seen = {}

    def __call__(self, images, proprio, instructions, query):
        frames = images["primary"][:, :, 0, 0, 0]
        for row, seed in enumerate(proprio[:, 0]):
            if instructions[row]:  # not to compile
                self.seen.setdefault(int(seed), set()).add(tuple(frames[row]))  # a set, since batches are filled up
        actions = np.zeros((len(proprio), 4, 2), np.float32)
        actions[..., 0] = (0.01 * frames.sum(1) * (proprio[:, 0] - 99))[:, None]
        return actions


@pytest.fixture(scope="module")
def in_process():
    policy = FrameCounter()
    return run_rollouts(policy, lambda task: CountingFactory(goal=1.0), CONFIG), policy.seen


@pytest.mark.parametrize("connections", ["one", "episodes"])
def test_served_episodes_are_those_in_process(in_process, connections):
    """The policy sees the same frames, wherever their history is kept, and the episodes end alike."""
    policy = FrameCounter()
    with serving(policy, LAYOUT, batch_sizes=(1, EPISODES)) as running, running.client() as client:
        per_episode = ConnectionPerEpisodePlan(running.client, 2 / 20)
        plan = LockstepPlan(client) if connections == "one" else per_episode
        results = run_rollouts(plan, lambda task: CountingFactory(goal=1.0), CONFIG)
        per_episode.close()
    expected, seen = in_process
    assert [(r.seed, r.success, r.steps) for r in results] == [(r.seed, r.success, r.steps) for r in expected]
    assert {result.success for result in results} == {True, False}
    assert policy.seen == seen


def test_frames_that_would_be_missing_are_told():
    with serving(FrameCounter(), LAYOUT, batch_sizes=(1,)) as running:
        plan = ConnectionPerEpisodePlan(running.client, 3 / 20)
        with pytest.raises(ValueError, match=r"a plan every 0\.15 s is every 1\.5 video frames; expected a whole number"):
            plan({"primary": np.zeros((1, 5, 2, 2, 3), np.uint8)}, np.zeros((1, 4), np.float32), ["count"], 0)
        plan.close()


def test_evaluation_of_a_served_policy_needs_no_jax():
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None; sys.path.insert(0, 'launch')\n"
        "import evaluate_served; from mimic_video.evaluation import metaworld; import configs.quickstart"
    )
    subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).resolve().parents[2], check=True)
