"""Writes small datasets in other people's formats, in the layouts that their own programs leave on disk."""

import fractions
import json
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.spatial.transform import Rotation

SIZE = (48, 64)  # height, width
TASKS = ("pick up the cup", "open the drawer")
TOP, FRONT, WRIST = (f"observation.images.{name}" for name in ("top", "front", "wrist"))
CAMERAS = (TOP, WRIST)


def grey(episode: int, step: int, camera: int = 0) -> int:
    """The grey of every pixel of a frame: no two neighbouring frames, episodes or cameras are alike."""
    return 20 + (70 * episode + 7 * step + 35 * camera) % 200


def frames(episode: int, length: int, camera: int = 0, size=SIZE) -> np.ndarray:
    values = np.array([grey(episode, step, camera) for step in range(length)], np.uint8)
    return np.broadcast_to(values[:, None, None, None], (length, *size, 3))


def state(episode: int, length: int) -> np.ndarray:
    """float32 (length, 3)."""
    return (100 * episode + np.arange(length)[:, None] + np.array([0.0, 0.25, 0.5])).astype(np.float32)


def encode(
    path: Path, images: np.ndarray, fps, codec: str = "libx264", options: Mapping[str, str] | None = None, faststart: bool = False
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream(codec, rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        stream.options = dict(options if options is not None else {"g": "2"})  # lerobot's own distance of keyframes
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


# Rows (a, b, c, d) of display matrices, x' = a·x + c·y and y' = b·x + d·y, and what they make of a picture (H, W, 3).
TURNS = {
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, -1, 1, 0): lambda picture: np.rot90(picture, 1),
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],
}


def turn_video(path: Path, turn: Sequence[float]) -> None:
    """Gives an MP4 file a display matrix: that of its track header, of which the boxes before are 40 bytes long."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 2**16) for value in turn)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(content)


def write_lerobot(
    directory: Path,
    version: str,
    lengths: Sequence[int] = (9, 12, 7),
    *,
    fps=10,
    cameras: Sequence[str] = CAMERAS,
    stored_as: str = "video",
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    faststart: bool = False,
    task_index_name: str | None = "task",
) -> Path:
    """Episode e has task e modulo 2, state `state(e, n)` and actions of state + 0.5; v3.0 has two episodes a file."""
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
        **{key: {"dtype": stored_as, "shape": [*SIZE, 3], "names": ["height", "width", "channels"]} for key in cameras},
        "observation.images.depth": {
            "dtype": "video",
            "shape": [*SIZE, 1],
            "names": ["height", "width", "channels"],
            "info": {"video.is_depth_map": True},
        },
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            key: {"dtype": "int64", "shape": [1], "names": None}
            for key in ("frame_index", "episode_index", "index", "task_index")
        },
    }
    v3 = version == "v3.0"
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(lengths)}"},
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    meta = directory / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info, indent=4))

    def encoded(image: np.ndarray, name: str) -> dict:
        path = directory / "one.png"
        Image.fromarray(np.ascontiguousarray(image)).save(path)
        return {"bytes": path.read_bytes(), "path": name}

    def columns(episodes: Sequence[int]) -> pa.Table:
        start = np.cumsum([0, *lengths])
        steps = {e: np.arange(lengths[e]) for e in episodes}
        table = {
            "observation.state": np.concatenate([state(e, lengths[e]) for e in episodes]),
            "action": np.concatenate([state(e, lengths[e]) + np.float32(0.5) for e in episodes]),
        }
        arrays = {key: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 3) for key, values in table.items()}
        arrays["timestamp"] = pa.array(np.concatenate([steps[e] / float(fps) for e in episodes]).astype(np.float32))
        arrays["frame_index"] = pa.array(np.concatenate([steps[e] for e in episodes]))
        arrays["episode_index"] = pa.array(np.repeat(episodes, [lengths[e] for e in episodes]))
        arrays["index"] = pa.array(np.concatenate([start[e] + steps[e] for e in episodes]))
        arrays["task_index"] = pa.array(np.repeat([e % 2 for e in episodes], [lengths[e] for e in episodes]))
        if stored_as == "image":
            for number, key in enumerate(cameras):
                arrays[key] = pa.array(
                    [
                        encoded(frame, f"frame-{k:06d}.png")
                        for e in episodes
                        for k, frame in enumerate(frames(e, lengths[e], number))
                    ]
                )
        return pa.table(arrays)

    def write_data(path: str, episodes: Sequence[int]) -> None:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(columns(episodes), directory / path, row_group_size=5)

    def write_videos(episodes: Sequence[int], **place: int) -> None:
        for number, key in enumerate(cameras if stored_as == "video" else ()):
            images = np.concatenate([frames(e, lengths[e], number) for e in episodes])
            encode(directory / info["video_path"].format(video_key=key, **place), images, fps, codec, options, faststart)

    if not v3:
        rows = [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": n} for e, n in enumerate(lengths)]
        (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
        (meta / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)) + "\n")
        for e in range(len(lengths)):
            place = {"episode_chunk": 0, "episode_index": e}
            write_data(info["data_path"].format(**place), [e])
            write_videos([e], **place)
        return directory

    # As pandas writes a frame of one column whose index holds the texts.
    pq.write_table(pa.table({"task_index": [0, 1], task_index_name or "__index_level_0__": list(TASKS)}), meta / "tasks.parquet")
    rows, start = [], np.cumsum([0, *lengths]).tolist()
    for file in range(-(-len(lengths) // 2)):
        episodes, place = list(range(2 * file, min(2 * file + 2, len(lengths)))), {"chunk_index": 0, "file_index": file}
        write_data(info["data_path"].format(**place), episodes)
        write_videos(episodes, **place)
        for e in episodes:
            first = sum(lengths[other] for other in episodes if other < e) / float(fps)
            row = {"episode_index": e, "tasks": [TASKS[e % 2]], "length": lengths[e]}
            row |= {f"data/{part}": value for part, value in place.items()}
            row |= {"dataset_from_index": start[e], "dataset_to_index": start[e + 1], "stats/action/min": [0.0]}
            for key in cameras if stored_as == "video" else ():
                row |= {f"videos/{key}/{part}": value for part, value in place.items()}
                row |= {f"videos/{key}/from_timestamp": first, f"videos/{key}/to_timestamp": first + lengths[e] / float(fps)}
            rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
    return directory


def write_libero(
    path: Path, demos: Mapping[str, np.ndarray], *, kind: str = "published", size=SIZE, success: bool = True
) -> Path:
    """One file of demonstrations by their actions (n, 7); row k of any observation tells k.

    `kind`: "libero", "openvla" or "published", by whom such a file was written. Pixels are brighter from left to right and from
    top to bottom as the file has them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if kind == "libero":
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["problem_info"] = json.dumps({"language_instruction": "Put it there", "problem_name": "p"})
        for name, actions in demos.items():
            n, demo = len(actions), data.create_group(name)
            demo["actions"] = np.asarray(actions, np.float64)
            demo["dones"] = np.arange(n) == (n - 1 if success else n)
            demo["rewards"] = demo["dones"][()]
            ramp = np.arange(size[0])[:, None] + np.arange(size[1])
            for number, key in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                values = (ramp + 2 * np.arange(n)[:, None, None] + 50 * number).astype(np.uint8)
                demo[f"obs/{key}"] = np.repeat(values[..., None], 3, -1)
            turned = Rotation.from_rotvec(np.arange(n)[:, None] * [0, 0, 0.1])
            demo["obs/ee_pos"] = np.arange(n)[:, None] + np.array([0.0, 0.1, 0.2])
            demo["obs/ee_ori"] = turned.as_quat() if kind == "published" else turned.as_rotvec()
            demo["obs/gripper_states"] = np.stack([0.04 - 0.001 * np.arange(n), 0.001 * np.arange(n) - 0.04], -1)
    return path


def write_bridge(
    root: Path,
    task: str = "toykitchen1/pick",
    *,
    trajectory: str = "raw/traj_group0/traj0",
    length: int = 6,
    label: str | None = "put the pot left\nconfidence: 1",
    cameras=("images0",),
    size=SIZE,
    changes=None,
) -> Path:
    """One trajectory folder; state k has its position at (k, 0.1, 0.2) m, turned by 0.1·k rad about z, and time 100 + 0.2·k s."""
    folder = root / task / "00" / "2023-01-01_00-00-00" / trajectory
    folder.mkdir(parents=True)
    steps = np.arange(length)
    poses = np.tile(np.eye(4), (length, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(steps[:, None] * [0, 0, 0.1]).as_matrix()
    poses[:, :3, 3] = np.stack([steps, np.full(length, 0.1), np.full(length, 0.2)], -1)
    full, desired = np.zeros((length, 7)), np.zeros((length, 7))
    full[:, 6], desired[:, 6] = 1.05 - 0.1 * steps, steps % 2
    record = {
        "eef_transform": poses,
        "full_state": full,
        "desired_state": desired,
        "time_stamp": (100 + 0.2 * steps).tolist(),
        "qpos": np.zeros((length, 6)),
        "env_done": np.zeros(length, bool),
    } | (changes or {})
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps(record, protocol=4))
    (folder / "policy_out.pkl").write_bytes(pickle.dumps([{"actions": np.zeros(7)}] * (length - 1)))
    for number, name in enumerate(cameras):
        (folder / name).mkdir()
        for k, frame in enumerate(frames(0, length, number, size)):
            Image.fromarray(np.ascontiguousarray(frame)).save(folder / name / f"im_{k}.jpg")
    if label is not None:
        (folder / "lang.txt").write_text(label, encoding="utf-8")
    return folder
