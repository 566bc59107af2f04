"""Speed of windows from the videos of a LeRobot dataset, beside PyAV that decodes the same frames and does nothing else."""

import concurrent.futures
import dataclasses
import itertools
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_pipelines.benchmark import (
    CACHE_MB,
    Measure,
    Size,
    loader_reader,
    measure_in_turns,
    measure_memory,
    open_stream,
    random_order,
)
from data_pipelines.loader import WindowDataset
from data_pipelines.sources.lerobot_split import SPLIT, LeRobotSplit
from data_pipelines.sources.records import DatasetError
from data_pipelines.sources.video import VideoFrames
from data_pipelines.windows import Anchors, inside, nearest, video_times
from mimic_video.config import DataConfig

_PAST, _FUTURE, _HZ = 5, 12, 10.0
_OPEN = 8  # videos that a thread of the comparison keeps open


class InnerWindows(WindowDataset):
    """Windows that lie inside their episodes: of others, fewer frames would be decoded than counted."""

    def __init__(self, source: LeRobotSplit, config: DataConfig):
        super().__init__(source, config, actions=False)
        whole = [
            np.flatnonzero(inside(clock, np.stack([video_times(time, config) for time in clock])).all(axis=1))
            for clock in self._clocks
        ]
        self._anchors = Anchors.of(whole, self._anchors.clock_of)

    def steps(self, index: int) -> tuple[int, np.ndarray]:
        """Of a window: number of its episode among `episodes`, and the steps of its frames."""
        episode, anchor = self.place(index)
        times = self.episodes[episode].timestamps
        return episode, nearest(times, video_times(times[anchor], self._config))


class _Videos(threading.local):
    """What a thread has open, the most recently used ones."""

    def __init__(self):
        self._open: OrderedDict[str, Any] = OrderedDict()

    def find(self, path: str) -> Any:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        container = av.open(path)
        container.streams.video[0].codec_context.thread_count = 1  # threads take windows
        self._open[path] = container
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()
        return container


def _decode(container: Any, times: np.ndarray, period: float) -> int:
    """Decodes on from the keyframe before the first time, and makes RGB of the frames at `times`; their number."""
    stream = container.streams.video[0]
    container.seek(max(0, int((times[0] - period / 2) / stream.time_base)), stream=stream)
    found = 0
    for frame in container.decode(stream):
        if frame.time >= times[found] - period / 2:
            frame.to_ndarray(format="rgb24")
            found += 1
            if found == len(times):
                break
    return found


def measure_source(
    directory: Path, windows: int, workers: int, image_size: Size | None, memory_windows: int = 0
) -> dict[str, Any]:
    """Frames per second of the loader and of PyAV alone, in turns, and their ratio; for `memory_windows`, memory while they pass.

    Windows are random ones of 5 + 12 frames of the primary camera at about 10 Hz, and the same for both. PyAV has as many threads
    as the machine has cores.

    Raises:
        DatasetError: if the dataset has no videos, or no episode is as long as a window.
    """
    recorded = LeRobotSplit(directory, SPLIT, cameras=())
    source = LeRobotSplit(directory, SPLIT, cameras=(), image_size=image_size)
    hz = recorded.control_hz / max(1, round(recorded.control_hz / _HZ))
    size = image_size or recorded.camera_sizes["primary"]
    config = DataConfig(image_size=size, past_frames=_PAST, future_frames=_FUTURE, video_hz=hz, frame_cache_mb=0)
    chosen = InnerWindows(source, config)
    if not len(chosen):
        raise DatasetError(f"{source.name}: no episode is as long as {_PAST + _FUTURE} frames at {hz:g} a second")
    clips = [recorded[recorded.numbers.index(number)].frames for number in chosen.numbers]
    if not all(isinstance(frames, VideoFrames) for frames in clips):
        raise DatasetError(f"{source.name}: the primary camera is no video at {recorded.control_hz:g} frames a second")
    result: dict[str, Any] = {}
    if memory_windows:  # first, while the process holds nothing else
        stream = open_stream(chosen, dataclasses.replace(config, frame_cache_mb=CACHE_MB), workers)
        result["memory"] = {"frames": size, **measure_memory(stream, memory_windows)}
    readers = {
        "loader": loader_reader(chosen, config, workers),
        "pyav": _pyav(chosen, clips, 1 / recorded.control_hz),
    }
    speeds = measure_in_turns(readers, windows)
    return result | {
        "dataset": directory.name,
        "episodes": len(chosen.episodes),
        "recorded": recorded.camera_sizes["primary"],
        "size": size,
        "workers": workers,
        "cores": len(os.sched_getaffinity(0)),
        "loader_frames_per_second": speeds["loader"],
        "pyav_frames_per_second": speeds["pyav"],
        "ratio_to_pyav": speeds["loader"] / speeds["pyav"],
    }


def _pyav(chosen: InnerWindows, clips: list[Any], period: float) -> Measure:
    videos, numbers, order = _Videos(), itertools.count(), random_order(chosen)

    def read(number: int) -> int:
        episode, steps = chosen.steps(order[number][1])
        return _decode(videos.find(clips[episode].path), clips[episode].times[np.unique(steps)], period)

    def measure(windows: int) -> float:
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            following = [next(numbers) for _ in range(windows)]
            start = time.perf_counter()
            for _ in pool.map(read, following):  # nothing is kept: to keep it would be slower than to make it
                pass
            return windows * (_PAST + _FUTURE) / (time.perf_counter() - start)

    return measure
