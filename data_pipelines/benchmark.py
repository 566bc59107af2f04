"""Speed and memory of the loader on made-up episodes of JPEG frames, beside OpenCV and tf.data."""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipelines.augmentation import Augmentation
from data_pipelines.episode import ArrayFrames, Episode
from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import FileFormat, write_rlds
from mimic_video.batch import Batch
from mimic_video.config import ActionDecoderConfig, AugmentationConfig, DataConfig
from mimic_video.transforms import resize_images

_LENGTH, _HZ, _BATCH = 100, 5.0, 2
CACHE_MB = 16  # of decoded frames while memory is watched: full and evicting all the time
_ROUNDS = 4
_SETTLE = 2.0  # seconds for a reader to fill its buffers again before the next one starts
_AUGMENTATION = AugmentationConfig(  # as Octo has it for finetuning
    crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), brightness=0.1, contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue=0.05
)
_POINTS, _SAMPLES = 20, 25  # parts that memory is averaged over, samples of each

Size = tuple[int, int]
Measure = Callable[[int], float]  # windows to read → frames per second


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    recorded_size: Size
    image_size: Size  # of windows
    episodes: int  # of 100 frames
    windows: int  # that each reader reads
    workers: int  # the loader's processes; 0 is threads
    format: FileFormat
    memory_windows: int  # to watch memory over; 0 leaves it out
    memory_size: Size  # of their frames
    augment: bool = False  # whether the loader is also measured with random crops and colours


class WholeWindows(WindowDataset):
    """Windows that lie inside their episodes: of others, fewer frames would be decoded than counted."""

    first, starts = DataConfig().past_frames - 1, _LENGTH - DataConfig().num_frames + 1  # frames of an episode

    def __len__(self) -> int:
        return len(self.episodes) * self.starts

    def __getitem__(self, index: int) -> dict:  # type: ignore[override]  # no slices
        episode, start = divmod(index, self.starts)
        return super().__getitem__(episode * _LENGTH + self.first + start)


def pictures(count: int, size: Size) -> Iterator[Episode]:
    """Episodes of smooth pictures with some noise, so that files have the size of photographs."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 128, (_LENGTH, size[0] // 16 + 1, size[1] // 16 + 1, 3), np.uint8)
        smooth = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, : size[0], : size[1]]
        frames = smooth + random.integers(0, 24, (*size, 1), np.uint8)
        yield Episode(f"episode {number}", np.arange(_LENGTH) / _HZ, ArrayFrames(frames), "do it")


def write_pictures(folder: str, name: str, size: Size, settings: Settings) -> pathlib.Path:
    return write_rlds(
        folder,
        name,
        {"train": pictures(settings.episodes, size)},
        control_hz=_HZ,
        image_size=size,
        jpeg_quality=90,
        description="Made up.",
        file_format=settings.format,
    )


def random_order(windows: WindowDataset) -> Mixture:
    """Which window comes when."""
    return Mixture([len(windows)], [Phase(0, (1.0,))], _BATCH, seed=0)


def open_stream(windows: WindowDataset, config: DataConfig, workers: int) -> Iterator[Batch]:
    """Batches of random windows, once every buffer of the loader has been filled for the first time."""
    stream = make_batches(
        [Part("windows", windows)],
        random_order(windows),
        batch_size=_BATCH,
        start_step=0,
        workers=workers,
        text=_no_text,
        decoder=ActionDecoderConfig(),
        augmentation=Augmentation(config.augmentation, config.cameras, 0) if config.augmentation.on else None,
    )
    _drain(stream, workers)
    return stream


def _drain(stream: Iterator[Batch], workers: int) -> None:
    """Takes what has been made ahead: up to four batches a process."""
    for _ in range(4 * max(1, workers)):
        next(stream)


def _no_text(_: str) -> np.ndarray:
    """In place of an encoder's rows."""
    return np.zeros((1, 1), np.float32)


def loader_reader(windows: WindowDataset, config: DataConfig, workers: int) -> Measure:
    stream = open_stream(windows, config, workers)

    def measure(count: int) -> float:
        _drain(stream, workers)
        start = time.perf_counter()
        for _ in range(count // _BATCH):
            video = next(stream).observation.video
        elapsed = time.perf_counter() - start
        assert video is not None and video.shape == (_BATCH, 1, config.num_frames, *config.image_size, 3)
        return count // _BATCH * _BATCH * config.num_frames / elapsed

    return measure


def opencv_reader(
    encoded: list[list[bytes]], config: DataConfig, resize: Callable[[np.ndarray, Size], np.ndarray] | None, threads: int
) -> Measure:
    import cv2  # only here and below: nothing else needs it

    cv2.setNumThreads(1)
    random = np.random.default_rng(1)

    def read(window: tuple[int, int]) -> np.ndarray:
        video = np.empty((config.num_frames, *config.image_size, 3), np.uint8)
        episode, first = window
        for frame, file in zip(video, encoded[episode][first : first + len(video)], strict=True):
            image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
            if resize is None:
                cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=frame)
            else:
                frame[:] = resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), config.image_size)
        return video

    def measure(windows: int) -> float:
        chosen = zip(random.integers(len(encoded), size=windows), random.integers(WholeWindows.starts, size=windows), strict=True)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            for _ in pool.map(lambda window: read(window).shape, chosen):
                pass
            return windows * config.num_frames / (time.perf_counter() - start)

    return measure


def area(image: np.ndarray, size: Size) -> np.ndarray:
    import cv2

    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


@contextlib.contextmanager
def tfdata_reader(directory: pathlib.Path, config: DataConfig, threads: int) -> Iterator[Measure]:
    """In a process of its own, as TensorFlow cannot be imported next to JAX."""
    arguments = [directory, config.num_frames, *config.image_size, _BATCH, threads]
    with subprocess.Popen(
        [sys.executable, "-m", "data_pipelines.benchmark_tfdata", *map(str, arguments)],
        cwd=pathlib.Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None and stdout is not None

        def measure(windows: int) -> float:
            print(windows, file=stdin, flush=True)
            answer = stdout.readline()
            if not answer:
                raise RuntimeError(f"the process of tf.data ended with exit code {child.wait()}; see its messages above")
            return float(answer)

        try:
            measure(4 * _BATCH)  # fills its buffers
            yield measure
        finally:
            stdin.close()


def measure_memory(stream: Iterator[Batch], windows: int) -> dict[str, float]:
    batches = -(-windows // _BATCH // _POINTS)
    means = []
    for _ in range(1 + _POINTS):
        samples = []
        for step in range(batches):
            next(stream)
            if step % -(-batches // _SAMPLES) == 0:
                samples.append(resident_bytes())
        means.append(float(np.mean(samples)))
    means = means[1:]
    return {
        "windows": batches * _BATCH * _POINTS,
        "first_mb": means[0] / 2**20,
        "last_over_first": means[-1] / means[0],
        "largest_over_first": max(means) / means[0],
    }


def resident_bytes() -> int:
    """Memory of this process and its children, shared pages counted once each.

    Pages of mapped files do not count: the kernel takes them back, and a share of libraries falls to other processes that run.
    """
    threads = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = [pid for thread in threads for pid in thread.read_text().split()]
    total = 0
    for pid in [str(os.getpid()), *children]:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    return total


def measure(settings: Settings) -> dict[str, Any]:
    """Frames per second of every reader, their ratios and, if asked for, memory."""
    threads, recorded, size = len(os.sched_getaffinity(0)), settings.recorded_size, settings.image_size
    result: dict[str, Any] = {
        "recorded": recorded,
        "size": size,
        "format": settings.format,
        "workers": settings.workers,
        "cores": threads,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if settings.memory_windows:  # first, while the process holds nothing else
            frames = settings.memory_size
            source = RldsSource(write_pictures(folder, "memory", frames, settings), "train")
            config = DataConfig(image_size=frames, frame_cache_mb=CACHE_MB)
            stream = open_stream(WholeWindows(source, config, actions=False), config, settings.workers)
            result["memory"] = {"frames": frames, **measure_memory(stream, settings.memory_windows)}
        directory = write_pictures(folder, "speed", recorded, settings)
        source = RldsSource(directory, "train", image_size=None if size == recorded else size)
        config = DataConfig(image_size=size, frame_cache_mb=0)
        encoded = [
            [bytes(file) for file in source.encoded(i, "steps/observation/image_primary", range(_LENGTH))]
            for i in range(len(source))
        ]
        readers = {
            "loader": loader_reader(WholeWindows(source, config, actions=False), config, settings.workers),
            "opencv": opencv_reader(encoded, config, None if size == recorded else area, threads),
        }
        if settings.augment:
            augmented = dataclasses.replace(config, augmentation=_AUGMENTATION)
            readers["augmented"] = loader_reader(WholeWindows(source, augmented, actions=False), augmented, settings.workers)
        if size != recorded:
            readers["opencv_pillow"] = opencv_reader(encoded, config, resize_images, threads)
        if settings.format == "tfrecord" and importlib.util.find_spec("tensorflow"):
            readers["tfdata"] = stack.enter_context(tfdata_reader(directory, config, threads))
        else:
            print("tf.data is left out: it needs TensorFlow, and --format=tfrecord", file=sys.stderr)
        speeds = measure_in_turns(readers, settings.windows)
    for name in dict.fromkeys([*speeds, "tfdata"]):
        result[f"{name}_frames_per_second"] = speeds.get(name)
        if name != "loader":
            result[f"ratio_to_{name}"] = speeds["loader"] / speeds[name] if name in speeds else None
    return result


def measure_in_turns(readers: dict[str, Measure], windows: int) -> dict[str, float]:
    """Frames per second of each, over rounds, so that what else the machine does meets all of them alike."""
    seconds = dict.fromkeys(readers, 0.0)  # for a frame, summed over rounds
    for _ in range(_ROUNDS):
        for name, measure in readers.items():
            seconds[name] += 1 / measure(windows // _ROUNDS)
            time.sleep(_SETTLE)
    return {name: _ROUNDS / total for name, total in seconds.items()}
