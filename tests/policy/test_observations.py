import dataclasses
import logging

import numpy as np
import pytest
from serving import LAYOUT, observation

from mimic_video.policy.observations import CLIENTS, BadRequest, Request, Session


def session(**renames):
    return Session(LAYOUT, renames, max_robots=4)


def session_of(client, cameras=("primary",), proprio_dim=3, **options):
    """For clients of another format."""
    layout = dataclasses.replace(LAYOUT, cameras=cameras, proprio_dim=proprio_dim)
    return Session(layout, options.pop("renames", {}), 4, CLIENTS[client], **options)


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
        ({"prompt": np.zeros(2)}, r"'prompt' is '\[0. 0.\]'; expected a string"),
        ({"prompt": b"\xff"}, r"'prompt' is b'\\xff'; expected text in UTF-8"),
        ({"timestamp": [1.0]}, r"'timestamp' is '\[1.0\]'; expected a finite number"),
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
    assert seen(current.accept(observation(timestamp=1.0), now=5.0)) == [7] * 5  # asked again
    both = {"images": np.zeros((2, 8, 16, 3), np.uint8), "state": np.zeros((2, 3)), "robots": 2, "prompt": "a"}
    with pytest.raises(BadRequest, match=r"'robots' .* frame has shape \(2, .*; this history holds frames of shape \(1, "):
        current.accept(both, now=1.5)


def test_an_episode_starts_after_a_pause():
    """openpi's clients say nothing of a reset. The instruction stays: a robot may also have been held up."""
    current = session_of("", episode_gap=0.5)
    for time, value in ((0.0, 1), (0.3, 2), (0.9, 3)):
        request = current.accept(observation(value, prompt="a"), now=time)
    assert seen(request) == [3] * 5 and request.history_frames == 1
    assert seen(current.accept(observation(4), now=1.0)) == [3, 3, 3, 3, 4]
    late = session_of("", episode_gap=0.7)
    for time, value in ((0.0, 1), (0.3, 2), (0.9, 3)):
        request = late.accept(observation(value, prompt="a"), now=time)
    assert seen(request) == [2, 2, 3, 3, 3]


def test_after_a_pause_there_may_be_other_robots():
    current = session()
    current.accept(observation(prompt="a"), now=0.0)
    both = {"images": np.zeros((2, 8, 16, 3), np.uint8), "state": np.zeros((2, 3)), "robots": 2, "prompt": "a"}
    assert current.accept(both, now=9.0).images["primary"].shape == (2, 5, 8, 16, 3)


UNIX = 1_764_000_000.0


@pytest.mark.parametrize(
    ("timestamp", "complaint"),
    [
        (UNIX * 1e3, "'timestamp' is 1764000000000; expected seconds, not milliseconds or nanoseconds"),
        (int(UNIX) * 10**9, "'timestamp' is 1764000000000000000; expected seconds, not"),
        (np.float32(UNIX), r"'timestamp' is 1764000000 as float32, which goes in steps of 128 s there; expected float64"),
        (np.array(UNIX, np.float32), "'timestamp' is 1764000000 as float32, which goes"),
        (np.float16(300), r"'timestamp' is 300 as float16, which goes in steps of 0\.25 s there"),
    ],
)
def test_times_that_tell_no_frames_apart(timestamp, complaint):
    with pytest.raises(BadRequest, match=f"field {complaint}"):
        session().accept(observation(prompt="a", timestamp=timestamp), now=0.0)


@pytest.mark.parametrize("timestamp", [np.float32(1.5), np.array(1.5), np.int64(1), 1, UNIX])
def test_times_that_do(timestamp):
    assert seen(session().accept(observation(prompt="a", timestamp=timestamp), now=0.0)) == [7] * 5


def test_pictures_of_one_time_that_came_at_several():
    """As of Unix seconds that have been float32, or of whole seconds."""
    current = session()
    for index in range(2):  # within a period of the video the last camera counts
        current.accept(observation(index, prompt="a", timestamp=UNIX), now=index * 0.06)
    with pytest.raises(BadRequest, match=r"'timestamp' is 1764000000\.000, as that of another picture 0\.120 s before; expected"):
        current.accept(observation(2, timestamp=UNIX), now=0.12)


@pytest.mark.parametrize("unit", [1e3, 1e6])
def test_a_clock_that_is_not_in_seconds_is_told_once(unit, caplog):
    current = session()
    with caplog.at_level(logging.WARNING):
        answers = [
            current.accept(observation(prompt="a", timestamp=0.1 * unit * index, plan=index % 2 == 0), now=50 + 0.1 * index)
            for index in range(4)
        ]
    warning = (
        f"field 'timestamp' went {0.1 * unit:g} s ahead within 0.100 s, past all 5 frames that the policy sees; is it in seconds?"
    )
    assert answers[0].warning == "" and answers[1] == {"history_frames": 1, "warning": warning} and answers[2].warning == ""
    assert [record.message for record in caplog.records] == [warning]


def test_frames_that_come_once_a_chunk_are_told_once():
    current = session()
    warnings = [current.accept(observation(prompt="a"), now=0.5 * index).warning for index in range(4)]
    assert (
        warnings[:2] == ["", ""]
        and warnings[3] == ""
        and warnings[2].startswith(
            "frames come every 0.500 s; the policy was trained on 10 a second: send those in between, too, with 'plan': false"
        )
    )


def test_no_warning_where_the_past_is_seen():
    """Frames at the video's rate, also of a simulation that is much faster than time; planning takes its time."""
    current = session()
    for index in range(20):
        planned = index % 5 == 0
        answer = current.accept(observation(prompt="a", timestamp=0.1 * index, plan=planned), now=1e-4 * index)
        assert not (answer.warning if planned else answer.get("warning"))


LIBERO = {
    "observation/state": np.arange(8.0),
    "observation/image": np.full((8, 16, 3), 1, np.uint8),
    "observation/wrist_image": np.full((8, 16, 3), 2, np.uint8),
    "prompt": "do something",
}
DROID = {
    "observation/exterior_image_1_left": np.full((8, 16, 3), 1, np.uint8),
    "observation/wrist_image_left": np.full((8, 16, 3), 2, np.uint8),
    "observation/joint_position": np.arange(7.0),
    "observation/gripper_position": np.array([7.0]),
    "prompt": "do something",
}
ALOHA = {
    "state": np.arange(14.0),
    "images": {
        name: np.full((3, 8, 16), value, np.uint8)
        for value, name in enumerate(("cam_high", "cam_left_wrist", "cam_low", "cam_right_wrist"), 1)
    },
    "prompt": "do something",
}


@pytest.mark.parametrize("cameras", [("primary",), ("primary", "wrist")])
@pytest.mark.parametrize(("client", "message"), [("libero", LIBERO), ("droid", DROID), ("aloha", ALOHA)])
def test_what_openpis_examples_send(client, message, cameras):
    """With the cameras that the policy has; others are left out."""
    dim = 14 if client == "aloha" else 8
    request = session_of(f"openpi_{client}", cameras, dim).accept(message, now=0.0)
    assert request.state.tolist() == [list(range(dim))] and request.instructions == ["do something"]
    assert list(request.images) == list(cameras)
    assert [frames[0, :, 0, 0].tolist() for frames in request.images.values()] == [[[v + 1] * 3] * 5 for v in range(len(cameras))]


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (DROID, r"unknown field 'exterior_image_1_left'; expected state"),
        (LIBERO, r"unknown field 'images\.wrist'"),
        (ALOHA, r"unknown field 'images\.cam_high'"),
    ],
)
def test_without_its_format_a_client_is_refused_by_name(message, complaint):
    with pytest.raises(BadRequest, match=complaint):
        session().accept(message, now=0.0)


def test_images_of_floats():
    """Of 0 to 1, as the uint8 that they come from; only where the client's format has them."""
    levels = np.arange(8 * 16 * 3, dtype=np.uint16).reshape(3, 8, 16).astype(np.uint8)
    current = session_of("openpi_aloha", proprio_dim=14)
    for dtype in (np.float32, np.float64):
        request = current.accept(ALOHA | {"images": {"cam_high": (levels / 255).astype(dtype)}}, now=0.0)
        np.testing.assert_array_equal(request.images["primary"][0, -1], levels.transpose(1, 2, 0))
    for wrong, shown in ((levels / 100, "0 to 2.55"), (np.full((3, 8, 16), np.nan), "nan to nan"), (levels / 255 - 1, "-1 to 0")):
        with pytest.raises(BadRequest, match=rf"'images.primary' has values from {shown} as float64; expected 0 to 1, or uint8"):
            current.accept(ALOHA | {"images": {"cam_high": wrong}}, now=0.0)
    with pytest.raises(BadRequest, match=r"'images.primary' has shape \(8, 16, 3\); expected \(3, H, W\) or \(5, 3, H, W\)"):
        current.accept(ALOHA | {"images": {"cam_high": LIBERO["observation/image"]}}, now=0.0)


def test_a_state_in_several_fields():
    own = {"joints": "state", "observation/gripper": "state", "image": "images.primary"}
    current = session_of("", proprio_dim=3, renames=own)
    message = {"image": observation()["images"]["primary"], "prompt": "a"}
    for joints, gripper in ((np.array([1.0, 2.0]), np.array(3)), ([1, 2.0], 3.0), (np.array([1, 2]), np.array([3], np.float32))):
        assert current.accept(message | {"observation.gripper": gripper, "joints": joints}, now=0.0).state.tolist() == [[1, 2, 3]]
    assert current.accept(message | {"plan": False}, now=0.0) == {"history_frames": 1}
    both = message | {
        "images": np.zeros((2, 8, 16, 3), np.uint8),
        "robots": 2,
        "joints": np.ones((2, 2)),
        "gripper": np.zeros((2, 1)),
    }
    del both["image"]
    assert session_of("", renames=own).accept(both, now=0.0).state.tolist() == [[1, 1, 0]] * 2
    for wrong, complaint in (
        ({"joints": np.zeros(2)}, "field 'gripper' is missing; expected an array"),
        ({"joints": np.zeros(2), "gripper": np.array([True])}, r"'gripper' \(1,\) bool; expected numbers that differ only in"),
        ({"joints": np.zeros((2, 2)), "gripper": np.zeros(2)}, r"fields are 'joints' \(2, 2\) float64, 'gripper' \(2,\) float64"),
        ({"joints": np.zeros(3), "gripper": 1}, r"'state' has shape \(4,\); expected \(3,\)"),
        ({"joints": np.zeros(2), "gripper": 1, "state": np.zeros(3)}, "'state' is there beside joints, gripper"),
    ):
        with pytest.raises(BadRequest, match=complaint):
            current.accept(message | wrong, now=0.0)


def test_renames_go_before_those_of_the_format():
    renames = {"images.cam_right_wrist": "images.wrist", "images.cam_left_wrist": ""}
    request = session_of("openpi_aloha", ("primary", "wrist"), 14, renames=renames).accept(ALOHA, now=0.0)
    assert request.images["wrist"][0, 0, 0, 0].tolist() == [4] * 3


def test_an_instruction_for_clients_that_send_none():
    """As openpi's ALOHA does not."""
    message = {name: value for name, value in ALOHA.items() if name != "prompt"}
    current = session_of("openpi_aloha", proprio_dim=14, prompt="stack")
    assert current.accept(message, now=0.0).instructions == ["stack"]
    assert current.accept(ALOHA, now=0.1).instructions == ["do something"]
    assert current.accept(message | {"reset": True}, now=0.2).instructions == ["stack"]
    with pytest.raises(BadRequest, match="'prompt' is missing; expected it once"):
        session_of("openpi_aloha", proprio_dim=14).accept(message, now=0.0)


@pytest.mark.parametrize("prompt", [b"\xc3\xb6ffne", "öffne"])
def test_prompts_of_bytes_are_utf8(prompt):
    assert session().accept(observation(prompt=prompt), now=0.0).instructions == ["öffne"]
