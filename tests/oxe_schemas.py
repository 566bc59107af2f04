"""Open-X datasets in the features that they are published with, every one of them, written by tfds itself.

    python tests/oxe_schemas.py FOLDER tfrecord

writes all of them. TFRecord needs TensorFlow, which has to be in a process of its own.

Sources. bridge and language_table: the features.json that the tensorflow/datasets repository has for its tests.
fractal20220817_data, kuka and taco_play: the TensorFlow Datasets catalogue, and the encodings of kuka from its features.json.
droid: its features.json where it could be seen and the dataset's documentation. bridge_orig: the converter of the raw recordings
with four cameras and depth. libero_spatial_no_noops: the converter of OpenVLA's modified LIBERO and descriptions of its release.
"""

import functools
import io
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

STEPS = 8

# A feature is its connector, dtype and shape, and maybe an encoding or a file format: "tensor float32 7 zlib".
_FLAGS = {f"steps/is_{flag}": "tensor bool" for flag in ("first", "last", "terminal")}
_SCALAR_FLAGS = dict.fromkeys(_FLAGS, "scalar bool")
_REWARD = {"steps/reward": "scalar float32"}
_DISCOUNT = {"steps/discount": "scalar float32"}
_RTX_TEXT = {
    "steps/observation/natural_language_instruction": "tensor string",
    "steps/observation/natural_language_embedding": "tensor float32 512",
}
_GOOGLE_ACTION = {
    "steps/action/base_displacement_vector": "tensor float32 2",
    "steps/action/base_displacement_vertical_rotation": "tensor float32 1",
    "steps/action/gripper_closedness_action": "tensor float32 1",
    "steps/action/rotation_delta": "tensor float32 3",
    "steps/action/terminate_episode": "tensor int32 3",
    "steps/action/world_vector": "tensor float32 3",
}

SCHEMAS: dict[str, dict[str, str]] = {
    "bridge": _FLAGS
    | _REWARD
    | _RTX_TEXT
    | {
        "episode_id": "tensor string",
        "steps/action/open_gripper": "tensor bool",
        "steps/action/rotation_delta": "tensor float32 3",
        "steps/action/terminate_episode": "tensor float32",
        "steps/action/world_vector": "tensor float32 3",
        "steps/observation/image": "image uint8 480x640x3",
        "steps/observation/state": "tensor float32 7",
    },
    "bridge_orig": {
        "episode_metadata/file_path": "text",
        **{
            f"episode_metadata/has_{what}": "scalar bool"
            for what in ("image_0", "image_1", "image_2", "image_3", "depth_0", "language")
        },
        "steps/action": "tensor float32 7",
        "steps/is_first": "scalar bool",
        "steps/is_last": "scalar bool",
        "steps/language_instruction": "text",
        **{f"steps/observation/image_{k}": "image uint8 480x640x3 jpeg" for k in range(4)},
        "steps/observation/depth_0": "image uint16 480x640x1 png",
        "steps/observation/state": "tensor float32 7",
    },
    "fractal20220817_data": _FLAGS
    | _REWARD
    | _RTX_TEXT
    | _GOOGLE_ACTION
    | {
        **{
            f"aspects/{aspect}": "tensor bool"
            for aspect in ("already_success", "feasible", "has_aspects", "success", "undesirable")
        },
        **{
            f"attributes/{attribute}{suffix}": f"tensor {dtype}"
            for attribute in ("collection_mode", "data_type", "env", "location", "objects_family", "task_family")
            for suffix, dtype in (("", "int64"), ("_name", "string"))
        },
        "steps/observation/base_pose_tool_reached": "tensor float32 7",
        "steps/observation/gripper_closed": "tensor float32 1",
        "steps/observation/gripper_closedness_commanded": "tensor float32 1",
        "steps/observation/height_to_bottom": "tensor float32 1",
        "steps/observation/image": "image uint8 256x320x3 jpeg",
        "steps/observation/orientation_box": "tensor float32 2x3",
        "steps/observation/orientation_start": "tensor float32 4",
        "steps/observation/robot_orientation_positions_box": "tensor float32 3x3",
        "steps/observation/rotation_delta_to_go": "tensor float32 3",
        "steps/observation/src_rotation": "tensor float32 4",
        "steps/observation/vector_to_go": "tensor float32 3",
        "steps/observation/workspace_bounds": "tensor float32 3x3",
    },
    "kuka": _FLAGS
    | _REWARD
    | _RTX_TEXT
    | _GOOGLE_ACTION
    | {
        "success": "tensor bool",
        "steps/observation/clip_function_input/base_pose_tool_reached": "tensor float32 7 zlib",
        "steps/observation/clip_function_input/workspace_bounds": "tensor float32 3x3 zlib",
        "steps/observation/gripper_closed": "tensor float32 1 zlib",
        "steps/observation/height_to_bottom": "tensor float32 1 zlib",
        "steps/observation/image": "image uint8 512x640x3 jpeg",
        "steps/observation/task_id": "tensor float32 1 zlib",
    },
    "droid": _FLAGS
    | _REWARD
    | _DISCOUNT
    | {
        "episode_metadata/file_path": "tensor string",
        "episode_metadata/recording_folderpath": "tensor string",
        "steps/action": "tensor float64 7",
        **{
            f"steps/action_dict/{name}_{kind}": f"tensor float64 {size}"
            for name, size in (("cartesian", 6), ("gripper", 1), ("joint", 7))
            for kind in ("position", "velocity")
        },
        **{f"steps/language_instruction{suffix}": "tensor string" for suffix in ("", "_2", "_3")},
        **{
            f"steps/observation/{name}_position": f"tensor float64 {size}"
            for name, size in (("cartesian", 6), ("gripper", 1), ("joint", 7))
        },
        **{
            f"steps/observation/{camera}_left": "image uint8 180x320x3 jpeg"
            for camera in ("exterior_image_1", "exterior_image_2", "wrist_image")
        },
    },
    "libero_spatial_no_noops": _SCALAR_FLAGS
    | _REWARD
    | _DISCOUNT
    | {
        "episode_metadata/file_path": "text",
        "steps/action": "tensor float32 7",
        "steps/language_instruction": "text",
        "steps/observation/image": "image uint8 256x256x3 jpeg",
        "steps/observation/joint_state": "tensor float32 7",
        "steps/observation/state": "tensor float32 8",
        "steps/observation/wrist_image": "image uint8 256x256x3 jpeg",
    },
    "taco_play": _FLAGS
    | _REWARD
    | _RTX_TEXT
    | {
        **{f"steps/action/{name}": "tensor float32 7" for name in ("actions", "rel_actions_gripper", "rel_actions_world")},
        "steps/action/terminate_episode": "tensor float32",
        "steps/observation/depth_gripper": "tensor float32 84x84",
        "steps/observation/depth_static": "tensor float32 150x200",
        "steps/observation/rgb_gripper": "image uint8 84x84x3",
        "steps/observation/rgb_static": "image uint8 150x200x3",
        "steps/observation/robot_obs": "tensor float32 15",
        "steps/observation/structured_language_instruction": "tensor string",
    },
    "language_table": _FLAGS
    | _REWARD
    | {
        "episode_id": "tensor string",
        "steps/action": "tensor float32 2",
        "steps/observation/effector_target_translation": "tensor float32 2",
        "steps/observation/effector_translation": "tensor float32 2",
        "steps/observation/instruction": "tensor int32 512",
        "steps/observation/rgb": "image uint8 360x640x3 jpeg",
    },
}


def position(k: int) -> tuple[float, float, float]:
    """Where the hand is at step k, in metres; x tells the step."""
    return 0.3 + 0.02 * k, 0.1, 0.2


def turn(k: int) -> float:
    """The hand's angle about the base's z at step k, in radians."""
    return 0.3 + 0.1 * k


COMMAND = (0.1, -0.2, 0.3)  # change of position that every step commands, in each dataset's own units
ROLL, YAW = 0.4, 0.5  # change of rotation in radians: first about x, then about the fixed z
OPEN = (1, 1, 1, 0, 0, 1, 1, 1)  # whether step k commands an open gripper


def _quaternion(k: int) -> list[float]:
    return [0.0, 0.0, np.sin(turn(k) / 2), np.cos(turn(k) / 2)]


def _google(k: int, pose: str) -> dict:
    """The gripper is commanded to close at step 3 and to open at step 5; at others it is left alone."""
    return {
        "steps/action/world_vector": COMMAND,
        "steps/action/rotation_delta": (ROLL, 0, YAW),
        "steps/action/gripper_closedness_action": [{3: 1.0, 5: -1.0}.get(k, 0.0)],
        f"steps/observation/{pose}": [*position(k), *_quaternion(k)],
        "steps/observation/gripper_closed": [0.25],
    }


def _bridge(k: int) -> list[float]:
    return [*position(k), 0, 0, turn(k), 0.75]


# What the entries of the registry read, at step k of each dataset.
_VALUES = {
    "bridge": lambda k: {
        "steps/action/open_gripper": bool(OPEN[k]),
        "steps/action/world_vector": COMMAND,
        "steps/observation/state": _bridge(k),
    },
    "bridge_orig": lambda k: {"steps/action": [*COMMAND, 0, 0, 0.1, OPEN[k]], "steps/observation/state": _bridge(k)},
    "fractal20220817_data": lambda k: _google(k, "base_pose_tool_reached"),
    "kuka": lambda k: _google(k, "clip_function_input/base_pose_tool_reached"),
    "droid": lambda k: {  # the command is the pose two steps later, with a gripper a quarter closed
        "steps/action_dict/cartesian_position": [*position(k + 2), 0, 0, turn(k + 2)],
        "steps/action_dict/gripper_position": [0.25],
        "steps/observation/cartesian_position": [*position(k), 0, 0, turn(k)],
        "steps/observation/gripper_position": [1.0],
    },
    "libero_spatial_no_noops": lambda k: {
        "steps/action": [*COMMAND, 0, 0, YAW, -1 if OPEN[k] else 1],
        "steps/observation/state": [*position(k), 0, 0, turn(k), 0.03, -0.03],
    },
    "taco_play": lambda k: {
        "steps/action/rel_actions_world": [*COMMAND, ROLL, 0, YAW, 1 if OPEN[k] else -1],
        "steps/observation/robot_obs": [*position(k), 0, 0, turn(k), 0.0807, *[0] * 8],
    },
    "language_table": lambda k: {"steps/action": COMMAND[:2], "steps/observation/effector_translation": position(k)[:2]},
}


def instruction(name: str, episode: int) -> str:
    return f"{name}: größe {episode}"


def write(root: Path, name: str, file_format: str, episodes: int = 1) -> Path:
    """`root/NAME/1.0.0` of episodes of `STEPS` steps; step k of the c-th camera by name has the grey 30·k + c."""
    schema = SCHEMAS[name]
    rest = {path: _default(text) for path, text in schema.items() if not path.startswith("steps/")}
    made = ((rest, [_step(name, episode, k) for k in range(STEPS)]) for episode in range(episodes))
    return write_episodes(root, name, {path: _feature(text) for path, text in schema.items()}, made, file_format)


def write_episodes(root: Path, name: str, features: dict, episodes: Iterable[tuple[dict, list[dict]]], file_format: str) -> Path:
    """`root/NAME/1.0.0` by tfds' own writer.

    Args:
        features: connector by path, such as steps/observation/image.
        episodes: of each, the values by path of what is not of a step, and of every step.
    """
    directory = root / name / "1.0.0"
    directory.mkdir(parents=True)
    tree = _nest(features)
    tree["steps"] = tfds.features.Dataset(_nest(tree["steps"]))
    identity = tfds.core.DatasetIdentity(name, tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(tree))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format=file_format)
    writer.initialize_splits(["train"])
    for rest, steps in episodes:
        inner = [_nest({path.removeprefix("steps/"): value for path, value in step.items()}) for step in steps]
        writer.add_examples({"train": [_nest(rest) | {"steps": inner}]})
    writer.close_all()
    return directory


def _step(name: str, episode: int, k: int) -> dict:
    schema, values = SCHEMAS[name], _VALUES[name](k)
    cameras = sorted(path for path, text in schema.items() if text.startswith("image uint8"))
    step = {path: _default(text) for path, text in schema.items() if path.startswith("steps/")}
    step |= {path: io.BytesIO(_image(schema[path], 30 * k + camera)) for camera, path in enumerate(cameras)}
    step |= {path: np.asarray(value, _parts(schema[path])[1]) for path, value in values.items()}
    words = instruction(name, episode)
    for path in step:
        if path.endswith("language_instruction"):
            step[path] = words
        elif path.endswith("/instruction"):
            step[path] = np.pad(np.frombuffer(words.encode(), np.uint8), (0, 512 - len(words.encode()))).astype(np.int32)
        elif path.startswith("steps/is_"):
            step[path] = k == (0 if path == "steps/is_first" else STEPS - 1)
    return step


def _parts(text: str) -> tuple[str, str, tuple[int, ...], str]:
    """Connector, dtype, shape, and an encoding or a file format if there is one."""
    kind, dtype, *rest = [*text.split(), "string"] if text == "text" else text.split()
    shape = tuple(int(size) for size in rest.pop(0).split("x")) if rest else ()
    return kind, dtype, shape, rest[0] if rest else ""


def _feature(text: str) -> tfds.features.FeatureConnector:
    kind, dtype, shape, what = _parts(text)
    if kind == "text":
        return tfds.features.Text()
    if kind == "image":
        return tfds.features.Image(shape=shape, dtype=np.dtype(dtype), encoding_format=what or None)
    dtype = np.str_ if dtype == "string" else np.dtype(dtype)
    if kind == "scalar":
        return tfds.features.Scalar(dtype)
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=what or "none")


def _default(text: str):
    kind, dtype, shape, _ = _parts(text)
    if kind == "image":
        return io.BytesIO(_image(text, 0))
    return "" if dtype == "string" else np.ones(shape, dtype)


@functools.cache
def _image(text: str, value: int) -> bytes:
    _, dtype, shape, file_format = _parts(text)
    file = io.BytesIO()
    Image.fromarray(np.full(shape if shape[2] > 1 else shape[:2], value, dtype)).save(file, file_format or "jpeg")
    return file.getvalue()


def _nest(flat: dict) -> dict:
    """Groups are one level deep, besides `steps`; a key of Kuka or BC-Z has a slash of its own."""
    nested: dict = {}
    for path, value in flat.items():
        group, slash, key = path.partition("/")
        if slash:
            nested.setdefault(group, {})[key] = value
        else:
            nested[path] = value
    return nested


if __name__ == "__main__":
    for each in SCHEMAS:
        write(Path(sys.argv[1]), each, sys.argv[2])
