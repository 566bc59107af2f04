import numpy as np
import pytest
from serving import LAYOUT, observation

from mimic_video.policy.observations import BadRequest, Request, Session


def session(**renames):
    return Session(LAYOUT, renames, max_robots=4)


def seen(request):
    """The first pixel of each frame, of the first robot."""
    return request.images["primary"][0, :, 0, 0, 0].tolist()


def test_frames_that_come_too_seldom_are_held():
    current = session()
    for time, value in ((0.0, 1), (0.2, 3), (0.4, 5)):
        request = current.accept(observation(value, prompt="a", timestamp=time), now=0.0)
    assert seen(request) == [1, 1, 3, 3, 5] and request.history_frames == 3


def test_frames_of_long_ago_are_forgotten():
    """As by a client that never says that an episode has ended."""
    current = session()
    for index in range(5):
        request = current.accept(observation(index, prompt="a"), now=0.1 * index)
    assert seen(request) == [0, 1, 2, 3, 4] and request.history_frames == 5
    request = current.accept(observation(9), now=10.0)
    assert seen(request) == [9] * 5 and request.history_frames == 1
    assert request.instructions == ["a"]


def test_a_reset_forgets_frames_and_instruction():
    current = session()
    current.accept(observation(1, prompt="a"), now=0.0)
    assert current.accept({"reset": True}, now=0.1) == {"reset": True}
    with pytest.raises(BadRequest, match="'prompt' is missing; expected it once"):
        current.accept(observation(2), now=0.2)
    request = current.accept(observation(3, prompt="b", reset=True), now=0.05)
    assert seen(request) == [3] * 5 and request.instructions == ["b"]


def test_a_refused_message_changes_nothing():
    current = session()
    current.accept(observation(1, prompt="a"), now=0.0)
    for wrong in ({"state": np.zeros(2)}, {"deadline": -1.0}, {"timestamp": "now"}, {"reset": True, "query": -1}):
        with pytest.raises(BadRequest):
            current.accept(observation(2, prompt="b") | wrong, now=0.1)
    request = current.accept(observation(3), now=0.4)
    assert seen(request) == [1, 1, 1, 3, 3] and request.instructions == ["a"]


@pytest.mark.parametrize(
    "names",
    [
        ("observation.images.primary", "observation.state", "task"),  # LeRobot
        ("observation/image", "observation/state", "prompt"),  # openpi
        ("images", "state", "prompt"),
        ("observation.images.front", "observation.qpos", "goal"),
    ],
)
def test_names_of_several_robot_stacks(names):
    renames = {"observation.images.front": "images.primary", "qpos": "state", "observation/goal": "prompt", "gripper": ""}
    plain = observation()
    message = dict(zip(names, (plain["images"]["primary"], plain["state"], "a"), strict=True)) | {"observation/gripper": 1.0}
    request = session(**renames).accept(message, now=0.0)
    assert isinstance(request, Request) and seen(request) == [7] * 5
    assert request.state.tolist() == [[1, 2, 3]] and request.instructions == ["a"]


def test_several_robots_of_one_client():
    frames = np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1) * np.ones((2, 8, 16, 3), np.uint8)
    message = {"images": frames, "state": np.zeros((2, 3)), "prompt": ["a", "b"], "robots": 2, "query": 3}
    request = session().accept(message, now=0.0)
    assert request.batched and request.instructions == ["a", "b"] and request.query == 3
    assert request.images["primary"][:, :, 0, 0, 0].tolist() == [[0] * 5, [1] * 5]


def test_the_whole_past_at_once():
    past = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((5, 8, 16, 3), np.uint8)
    assert seen(session().accept(observation(prompt="a") | {"images": past}, now=0.0)) == [0, 1, 2, 3, 4]


def test_pictures_are_resized_and_copied():
    image = np.full((16, 32, 3), 9, np.uint8)
    request = session().accept(observation(prompt="a") | {"images": image}, now=0.0)
    assert request.images["primary"].shape == (1, 5, 8, 16, 3) and seen(request) == [9] * 5
    assert not np.shares_memory(request.images["primary"], image)


def test_a_history_is_bounded():
    current = session()
    with pytest.raises(BadRequest, match=r"81 frames came within 0\.5 s; expected at most 160 a second"):
        for index in range(1000):
            current.accept(observation(1, prompt="a", timestamp=index * 1e-4), now=0.0)
    assert index == 81


def test_a_repeated_request_is_the_same_request():
    current = session()
    for value in (1, 2, 2):
        request = current.accept(observation(value, prompt="a", timestamp=0.1 * value), now=0.0)
    assert seen(request) == [1, 1, 1, 1, 2] and request.history_frames == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stat": 1}, r"unknown field 'stat'; expected state, .*did you mean 'state'"),
        ({"state": np.zeros(4)}, r"'state' has shape \(4,\); expected \(3,\)"),
        ({"state": np.array([1, 2, np.nan])}, "'state' is .*nan.*; expected finite numbers"),
        ({"state": np.array([1, 2, 1e300])}, "'state' is .*; expected finite numbers"),
        ({"state": np.array([True, True, True])}, "'state' has dtype bool; expected numbers"),
        ({"state": "abc"}, "'state' is a str; expected an array"),
        (
            {"images": np.zeros((3, 8, 16), np.uint8)},
            r"'images.primary' has shape \(3, 8, 16\); expected \(H, W, 3\) or \(5, H, W",
        ),
        ({"images": np.zeros((4, 8, 16, 3), np.uint8)}, r"has shape \(4, 8, 16, 3\)"),
        ({"images": np.zeros((0, 16, 3), np.uint8)}, "sides of up to 4096 pixels"),
        ({"images": np.zeros((8, 16, 3), np.float32)}, "'images.primary' has dtype float32; expected uint8"),
        ({"images": {"wrist": np.zeros((8, 16, 3), np.uint8)}}, "unknown field 'images.wrist'"),
        ({"images": {}}, "'images.primary' is missing; expected an array"),
        ({"image": np.zeros((8, 16, 3), np.uint8)}, "'image' is 'images.primary', which the message has already"),
        ({"prompt": ""}, "'prompt' is '', 0 characters; expected 1 to 2000"),
        ({"prompt": "a" * 2001}, "2001 characters"),
        ({"prompt": ["a", "b"]}, r"'prompt' is .*; expected a string"),
        ({"prompt": 3}, "'prompt' is '3'; expected a string"),
        ({"robots": 5}, "'robots' is '5'; expected a whole number from 1 to 4"),
        ({"robots": 2}, r"'images.primary' has shape \(8, 16, 3\); expected \(2, H, W, 3\) or \(2, 5, H, W, 3\)"),
        ({"query": True}, "'query' is 'True'; expected a whole number"),
        ({"deadline": 0}, "'deadline' is 0; expected a positive number"),
        ({"deadline": float("inf")}, "'deadline' is 'inf'; expected a finite number"),
        ({"plan": "no"}, "'plan' is 'no'; expected true or false"),
    ],
)
def test_a_wrong_field_is_named(change, complaint):
    with pytest.raises(BadRequest, match=complaint):
        session().accept(observation(prompt="a") | change, now=0.0)


def test_times_increase_and_robots_stay():
    current = session()
    current.accept(observation(prompt="a", timestamp=1.0), now=0.0)
    with pytest.raises(BadRequest, match=r"the frame's timestamp is 0\.500 s, and the last one's 1\.000 s"):
        current.accept(observation(timestamp=0.5), now=5.0)
    assert seen(current.accept(observation(9, timestamp=1.0), now=5.0)) == [9] * 5  # asked again
    both = {"images": np.zeros((2, 8, 16, 3), np.uint8), "state": np.zeros((2, 3)), "robots": 2, "prompt": "a"}
    with pytest.raises(BadRequest, match=r"'robots' .* frame has shape \(2, .*; this history holds frames of shape \(1, "):
        current.accept(both, now=6.0)
