"""Measures the loader on made-up episodes of 480x640 JPEG frames, beside decoding the same bytes; prints one JSON line.

    python launch/benchmark_data.py [--size=480x640] [--workers=2] [--windows=200]

Windows of 61 frames are drawn at random from all episodes. `ratio_to_opencv` is the loader's frames per second over those of
OpenCV, which decodes (and resizes to --size, if that is another) frames of the same files in as many threads as the loader has
processes, with nothing else to do. Memory is of the process and its workers; its growth, from a tenth of the windows to all.
"""

import concurrent.futures
import json
import os
import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags

from data_pipelines.episode import ArrayFrames, Episode
from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds
from mimic_video.config import ActionDecoderConfig, DataConfig

_SIZE = flags.DEFINE_string("size", "480x640", "Height x width that windows have; recorded are 480x640")
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that read windows, and threads of OpenCV", lower_bound=1)
_WINDOWS = flags.DEFINE_integer("windows", 200, "Windows to read", lower_bound=20)
_EPISODES = flags.DEFINE_integer("episodes", 20, "Episodes of 100 frames", lower_bound=1)
_FORMAT = flags.DEFINE_enum("format", "tfrecord", ["tfrecord", "array_record"], "Of the dataset")

_RECORDED, _LENGTH, _HZ = (480, 640), 100, 5.0
_BATCH = 2


def episodes(count: int):
    """Smooth pictures with some detail, so that files have the size of photographs."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (_LENGTH, 30, 40, 3), np.uint8)
        frames = np.repeat(np.repeat(coarse, 16, axis=1), 16, axis=2) // 2 + random.integers(0, 24, (*_RECORDED, 1), np.uint8)
        yield Episode(f"episode {number}", np.arange(_LENGTH) / _HZ, ArrayFrames(frames.astype(np.uint8)), "do it")


def resident_bytes() -> int:
    """Of this process and its children, shared pages counted once each."""
    threads = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = [pid for thread in threads for pid in thread.read_text().split()]
    total = 0
    for pid in [str(os.getpid()), *children]:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def measure_loader(source: RldsSource, config: DataConfig, size: tuple[int, int]) -> dict[str, float]:
    windows = WindowDataset(source, config, actions=False)
    mixture = Mixture([len(windows)], [Phase(0, (1.0,))], _BATCH, seed=0)
    stream = make_batches([Part("synthetic", windows)], mixture, batch_size=_BATCH, start_step=0, workers=_WORKERS.value,
                          text=_no_text, decoder=ActionDecoderConfig())  # fmt: skip
    steps, memory = _WINDOWS.value // _BATCH, []
    for _ in range(_WORKERS.value + 1):  # start the workers, fill their buffers
        next(stream)
    start = time.perf_counter()
    for step in range(steps):
        frames = next(stream)["video"]
        if step in (steps // 10, steps - 1):
            memory.append(resident_bytes())
    elapsed = time.perf_counter() - start
    assert frames.shape == (_BATCH, config.num_frames, *size, 3)
    return {"frames_per_second": steps * _BATCH * config.num_frames / elapsed, "memory_mb": memory[1] / 2**20,
            "memory_growth": memory[1] / memory[0] - 1}  # fmt: skip


def _no_text(_: str) -> np.ndarray:
    return np.zeros((1, 1), np.float32)


def measure_opencv(encoded: list[list[bytes]], frames: int, size: tuple[int, int]) -> float:
    """Frames per second of decoding, and resizing if need be, windows of as many random frames."""
    import cv2

    cv2.setNumThreads(1)
    random = np.random.default_rng(1)

    def window(_: int) -> None:
        episode = encoded[random.integers(len(encoded))]
        first = random.integers(len(episode) - frames)
        for file in episode[first : first + frames]:
            image = cv2.cvtColor(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            if size != _RECORDED:
                cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)

    with concurrent.futures.ThreadPoolExecutor(_WORKERS.value) as pool:
        start = time.perf_counter()
        list(pool.map(window, range(_WINDOWS.value)))
        return _WINDOWS.value * frames / (time.perf_counter() - start)


def main(_: list[str]) -> None:
    size = tuple(int(n) for n in _SIZE.value.split("x"))
    config = DataConfig(image_size=size, frame_cache_mb=0)
    with tempfile.TemporaryDirectory() as folder:
        directory = write_rlds(folder, "synthetic", {"train": episodes(_EPISODES.value)}, control_hz=_HZ, image_size=_RECORDED,
                               jpeg_quality=90, description="Made up.", file_format=_FORMAT.value)  # fmt: skip
        source = RldsSource(directory, "train", image_size=None if size == _RECORDED else size)
        result = {"size": _SIZE.value, "format": _FORMAT.value, "workers": _WORKERS.value, **measure_loader(source, config, size)}
        path = "steps/observation/image_primary"
        encoded = [[bytes(file) for file in source.encoded(i, path, range(_LENGTH))] for i in range(len(source))]
        result["opencv_frames_per_second"] = measure_opencv(encoded, config.num_frames, size)
        result["ratio_to_opencv"] = result["frames_per_second"] / result["opencv_frames_per_second"]
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
