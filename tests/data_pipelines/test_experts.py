import itertools
import logging

import numpy as np
import pytest

from data_pipelines.sources import experts as source
from data_pipelines.workers import worker_processes
from mimic_video.evaluation.metaworld import MetaworldExpert, MetaworldFactory

pytestmark = pytest.mark.simulator

DRAWER, NAME = MetaworldFactory("drawer-open-v3", (64, 64)), "metaworld/drawer-open-v3"


def demonstrate(seed):
    return source.demonstrate(DRAWER(), DRAWER.expert(), NAME, seed)


@pytest.fixture(scope="module")
def workers():
    with worker_processes(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def episodes(workers):
    return list(source.demonstrations(DRAWER, NAME, [0, 2, 1], workers))


def test_episodes_come_in_the_order_of_the_seeds(episodes):
    assert [episode.name for episode in episodes] == [f"metaworld/drawer-open-v3/seed {seed}" for seed in (0, 2, 1)]


def test_episode_contents(episodes):
    for episode in episodes:
        n = len(episode)
        assert 15 < n < MetaworldExpert.max_steps + source.STEPS_AFTER_SUCCESS
        assert episode.instruction == "open the drawer"
        np.testing.assert_allclose(np.diff(episode.timestamps), 0.05)
        assert episode.proprio.shape == (n, 4) and episode.proprio.dtype == np.float32
        assert episode.actions.shape == (n, 4) and episode.actions.dtype == np.float32
        assert np.abs(episode.actions).max() <= 1
        assert episode.frames.take([n - 1, 0]).shape == (2, 64, 64, 3)
        assert (episode.frames.take([0]) != episode.frames.take([n - 1])).mean() > 0.02


def test_an_episode_is_a_function_of_task_and_seed(episodes):
    again = demonstrate(2)
    np.testing.assert_array_equal(again.actions, episodes[1].actions)
    np.testing.assert_array_equal(again.proprio, episodes[1].proprio)
    np.testing.assert_array_equal(again.frames.array, episodes[1].frames.array)


def _replay(episode, seed):
    """Largest deviation from the episode's proprioception when its own labels are executed, and when success came."""
    environment = DRAWER()
    observation, _ = environment.reset(seed=seed)
    deviation, success_step = 0.0, None
    for step, action in enumerate(episode.actions):
        deviation = max(deviation, float(np.abs(observation["proprio"] - episode.proprio[step]).max()))
        observation, *_, info = environment.step(action)
        if info["success"] and success_step is None:
            success_step = step
    return deviation, success_step


def test_without_noise_the_labels_are_what_was_executed(episodes):
    deviation, success_step = _replay(episodes[0], seed=0)  # seed 0: noise scale 0
    assert deviation < 1e-5  # the label is the executed action in float32
    assert len(episodes[0]) == success_step + 1 + source.STEPS_AFTER_SUCCESS


@pytest.mark.filterwarnings("ignore:Constant")
def test_with_noise_the_labels_are_the_clean_expert(episodes):
    deviation, _ = _replay(episodes[1], seed=2)  # seed 2: noise scale 0.5
    assert deviation > 0.01
    from metaworld.policies import ENV_POLICY_MAP

    environment = DRAWER()
    environment.reset(seed=2)
    first = ENV_POLICY_MAP["drawer-open-v3"]().get_action(environment.state)
    np.testing.assert_array_equal(episodes[1].actions[0], np.clip(first, -1, 1).astype(np.float32))


def test_unlabelled_videos_have_neither_actions_nor_proprioception(episodes, workers):
    (video,) = source.demonstrations(DRAWER, NAME, [0], workers, labelled=False)
    assert video.actions is None and video.proprio is None
    np.testing.assert_array_equal(video.frames.array, episodes[0].frames.array)


def test_failed_experts_are_left_out_and_logged(monkeypatch, caplog):
    fake = [(4, None), (5, demonstrate(0)), (6, None)]
    monkeypatch.setattr(source, "_demonstrate_all", lambda *_: iter(fake))
    with caplog.at_level(logging.INFO):
        assert len(list(source.demonstrations(DRAWER, NAME, [4, 5, 6], None))) == 1
    assert "seed 4" in caplog.text and "seed 6" in caplog.text and "1 of 3 demonstrations succeeded" in caplog.text
    monkeypatch.setattr(source, "_demonstrate_all", lambda *_: iter(fake[:1]))
    with pytest.raises(RuntimeError, match="none of 1 seeds"):
        list(source.demonstrations(DRAWER, NAME, [4], None))


def test_an_expert_that_runs_out_of_steps_has_failed(monkeypatch):
    monkeypatch.setattr(MetaworldExpert, "max_steps", 5)
    assert demonstrate(0) is None


def test_an_endless_supply_of_seeds_can_be_cut_short(workers):
    futures = []

    class Recorded:
        def submit(self, *call):
            futures.append(workers.submit(*call))
            return futures[-1]

    factory = MetaworldFactory("button-press-topdown-v3", (32, 32))
    endless = source.demonstrations(factory, "metaworld/button-press-topdown-v3", itertools.count(), Recorded(), ahead=30)
    assert [episode.name[-6:] for episode in itertools.islice(endless, 2)] == ["seed 0", "seed 1"]
    endless.close()
    assert sum(future.cancelled() for future in futures) > 15  # the workers are free for what is asked next


def test_a_failure_in_a_worker_names_task_and_seed(workers):
    with pytest.raises(RuntimeError, match=r"drawer-open-v3.*seed -1"):
        list(source.demonstrations(DRAWER, NAME, [-1], workers))
