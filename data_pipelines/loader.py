"""Datasets → an endless stream of training batches whose N-th one is a function of (seed, N)."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags, logging

from data_pipelines import buffers
from data_pipelines.augmentation import Augmentation
from data_pipelines.episode import Episode, EpisodeSource, Frames
from data_pipelines.mixture import Mixture
from data_pipelines.precompute import Chosen, LatentCache
from data_pipelines.sources.records import DatasetError
from data_pipelines.survey import readable, survey_of
from data_pipelines.windows import (
    TOLERANCE,
    Anchors,
    action_times,
    action_window,
    anchors,
    video_masks,
    video_times,
    video_window,
)
from mimic_video.batch import Batch, make_batch
from mimic_video.config import ActionDecoderConfig, ConfigError, DataConfig
from mimic_video.embodiments import pad_last
from mimic_video.transforms import Normalizer

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)  # whole batches; JPEG decoding releases the interpreter lock
_BUFFERED = 2  # batches of a worker process
_TEXT_CACHE = 256  # instructions; 2 MB each at 512 rows of 1024
_SHARED = 6  # batches of a worker process that are in shared memory at most: in its queue, before it and behind it
_SHARED_MEMORY = "/dev/shm"
_ENDLESS = 2**62  # samples
_ATTEMPTS = 100  # windows in a row that may be broken


class WindowDataset(Sequence[dict]):
    """Every window of a source's episodes, in order: episode by episode, anchor by anchor.

    Which windows there are is computed from a survey of the source. An episode is read when a window needs it; frames are decoded
    then and kept in `config.frame_cache_mb` megabytes. With `config.skip_broken` an episode that cannot be read is left out, and
    the log says so. Thread-safe.

    Attributes:
        episodes: those that can be read, read when they are asked for, their frames through the cache.
        instructions: every one of theirs, once.
        content: their `content_hash`.
        action_dim: width of actions, or None if windows have none.
        raw_dims: dimensions of "action" and "proprio" that are not to be normalised.
        cameras: those of `config` that the source has.
        robot: whose episodes they are; None for a robot of their own.
        control_hz: recorded steps a second.

    Args:
        source: the episodes.
        config: the window.
        actions: whether windows carry proprio and actions (the stage `action`) or only video.
        raw_dims: None for those of `config`.
        robot: as above.

    Raises:
        DatasetError: if the source lacks actions or proprio that are asked for, if an episode cannot be read, or if even the
            longest one is shorter than the window.
    """

    def __init__(
        self,
        source: EpisodeSource,
        config: DataConfig,
        *,
        actions: bool,
        raw_dims: Mapping[str, tuple[int, ...]] | None = None,
        robot: str | None = None,
    ):
        if actions and (source.action_dim is None or source.proprio_dim is None):
            missing = "action" if source.action_dim is None else "proprio"
            raise DatasetError(f"{source.name} has no {missing}; windows with actions need both action and proprio")
        self._config, self._actions, self._source, self.robot = config, actions, source, robot
        self._latents: tuple[LatentCache, np.ndarray] | None = None  # and its row of each episode's first step
        self.action_dim = source.action_dim if actions else None
        self.raw_dims = raw_dims or {"action": config.raw_action_dims, "proprio": config.raw_proprio_dims}
        self.cameras = tuple(camera for camera in config.cameras if camera in source.camera_sizes)
        self.control_hz = source.control_hz
        survey = survey_of(source)
        _report(source, survey.broken, config.skip_broken)
        self.instructions, self.content = survey.instructions, survey.content
        self._clocks, clock_of = survey.clocks, survey.clock_of
        places = readable(len(source), survey.broken)
        self.episodes = _Episodes(source, places, self.cameras, _FrameCache(config.frame_cache_mb * 2**20))
        _check_horizons(source.name, self._clocks, len(self.episodes), config, actions)
        self._anchors = Anchors.of([anchors(clock, config, actions=actions) for clock in self._clocks], clock_of)
        if short := int((self._anchors.count[clock_of] == 0).sum()):
            logging.warning(
                "%d of %d episodes of %s have no window: they end before their first action",
                short,
                len(self.episodes),
                source.name,
            )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"instructions": []}  # which workers do not need, and of which there may be very many

    def __len__(self) -> int:
        return len(self._anchors)

    def __getitem__(self, index: int) -> dict:  # type: ignore[override]  # no slices
        """One window: its anchor's `instruction` (str), and the arrays of `video_window` and maybe of `action_window`."""
        number, anchor = self.place(index)
        episode = self.episodes[number]
        if self._latents is None:
            video = video_window(episode, anchor, self._config)
        else:
            latents, rows = self._latents
            video = {
                "latents": latents[int(rows[number]) + anchor // latents.stride],
                **video_masks(episode, anchor, self._config),
            }
        sample = {"instruction": episode.instruction_at(anchor), **video}
        if self._actions:
            sample |= action_window(episode, anchor, self._config)
        return sample

    def place(self, index: int) -> tuple[int, int]:
        """Of a window the place of its episode in `episodes`, and the step that it is anchored at."""
        return self._anchors.place(index)

    def windows_of(self, episode: int) -> range:
        """The numbers of the windows of one of `episodes`."""
        return self._anchors.windows_of(episode)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (episodes,), their steps."""
        return np.array(list(map(len, self._clocks)), np.int64)[self._anchors.clock_of]

    @property
    def numbers(self) -> list[int]:
        """Of the episodes in the whole split."""
        return [self._source.numbers[place] for place in self.episodes.places]

    @property
    def identity(self) -> str:
        """Hex digits that tell the frames and their times from those of other datasets, wherever they lie."""
        digest = hashlib.sha256(self._source.identity.encode())
        stamps = [clock.tobytes() for clock in self._clocks]
        for clock in self._anchors.clock_of.tolist():
            digest.update(stamps[clock])
        return digest.hexdigest()

    def chosen_of(self, whole: Self) -> Chosen:
        """These episodes among those of the whole split; both are read with the same configuration."""
        places = {number: place for place, number in enumerate(whole.numbers)}
        return Chosen(whole.lengths.tolist(), [places[number] for number in self.numbers])

    def with_latents(self, latents: LatentCache, chosen: Chosen | None = None) -> Self:
        """Those of the windows that `latents`, which are of the same episodes or of others besides, hold.

        They have `latents` (v, t, h, w, c), float32 or bfloat16, in place of `video`; no frame is decoded.

        Args:
            chosen: of these episodes, if latents are of others besides: `chosen_of` all of them.
        """
        cached = copy.copy(self)
        cached.instructions = self.instructions  # which a copy lacks, as a worker's does
        cached._anchors = self._anchors.every(latents.stride)
        cached._latents = latents, (chosen or self.chosen_of(self)).rows(latents.stride)[:, 0]
        return cached


class _Episodes(Sequence[Episode]):
    """Episodes at some places of a source, read when they are asked for, the frames of the named cameras through a cache."""

    def __init__(self, source: EpisodeSource, places: Sequence[int] | np.ndarray, cameras: Sequence[str], cache: "_FrameCache"):
        self._source, self.places, self._cameras, self._cache = source, places, cameras, cache

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        """An episode, or a list of a slice of them."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        place = int(self.places[number])
        episode = self._source[place]
        primary, *further = (_CachedFrames(self._cache, name, place, episode.cameras[name]) for name in self._cameras)
        return dataclasses.replace(episode, frames=primary, further_cameras=dict(zip(self._cameras[1:], further, strict=True)))


@dataclasses.dataclass(frozen=True)
class Part:
    """One dataset of a mixture.

    Attributes:
        name: the dataset.
        windows: all of its windows.
        normalizers: for the keys "action" and "proprio"; None leaves raw units.
        embodiment: number of its robot; None for the dataset's own number in the mixture.
    """

    name: str
    windows: WindowDataset
    normalizers: Mapping[str, Normalizer] | None = None
    embodiment: int | None = None

    def __post_init__(self):
        if self.normalizers is not None and set(self.normalizers) != {"action", "proprio"}:
            raise ValueError(f"normalizers of {self.name!r} are for {sorted(self.normalizers)}; expected action and proprio")


def make_batches(
    parts: Sequence[Part],
    mixture: Mixture,
    *,
    batch_size: int,
    start_step: int,
    text: Callable[[str], np.ndarray],
    decoder: ActionDecoderConfig,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    skip_broken: bool = False,
    scales: bool = False,
    augmentation: Augmentation | None = None,
) -> Iterator[Batch]:
    """This process's rows of an endless stream of batches, made ahead in the background.

    The global batch of a step depends on the mixture and the step alone, row for row: not on `start_step` or `workers`, nor on
    how `rows` divide it among processes.

    Args:
        parts: the mixture's datasets, in its order.
        mixture: which sample comes when.
        batch_size: global.
        start_step: the step of the first batch, to resume there.
        text: instruction → float32 (rows, width); called once for an instruction (the last 256 are kept).
        decoder: the widths p and m that proprioception and actions of narrower datasets are padded to with zeros.
        rows: numbers of the b rows of every global batch that this process reads, in the order it gets them; None for all.
        workers: processes that read windows; 0 reads in threads of this process.
        skip_broken: replaces a window that cannot be read by the next one of its dataset, and says so in the log; otherwise it is
            an error.
        scales: gives errors of normalised actions their raw units back.
        augmentation: of frames, in training.

    Returns:
        Iterator of batches of NumPy arrays. `latents` are there in place of `video` for datasets `with_latents`; actions and
        proprioception for datasets with actions; `action_dims` if one of these is narrower than m; `embodiment`, the number of
        the row's robot, if the decoder tells them apart; and `action_scale` with `scales`.

    Raises:
        ValueError: if there are no rows, or some that a batch does not have.
        ConfigError: if there are `workers`, and shared memory for their batches is missing.
    """
    rows = range(batch_size) if rows is None else rows
    if not rows or not set(rows) <= set(range(batch_size)):
        raise ValueError(f"rows are {list(rows)}; expected one or more from 0 to batch_size-1={batch_size - 1}")
    number = _SampleNumber(batch_size, tuple(rows))
    load = _Load(tuple(parts), mixture, _Once(text), decoder, skip_broken, scales, augmentation)
    batches = grain.MapDataset.range(_ENDLESS // batch_size * len(rows)).map(number).map(load).batch(len(rows), batch_fn=_stack)
    iterator = batches[start_step:].to_iter_dataset(_READ)
    if workers:
        sample = load(number(start_step * len(rows)))
        _require_shared_memory(workers, len(rows) * sum(np.asarray(value).nbytes for value in sample.values()))
        if not flags.FLAGS.is_parsed():  # Grain's own, which nobody parses outside of a launch script
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BUFFERED))
    return iter(iterator)


def _require_shared_memory(workers: int, size: int) -> None:
    """Raises ConfigError if /dev/shm, through which `workers` hand over batches of `size` bytes, has no room for them.

    Without room the system ends the workers (SIGBUS). Containers have 64 MB unless they are told otherwise.
    """
    needed = size * (workers * _SHARED + 2)  # and those that training has
    try:
        system = os.statvfs(_SHARED_MEMORY)
        free = system.f_bavail * system.f_frsize
    except FileNotFoundError:
        free = 0
    if needed > free:
        raise ConfigError(
            f"config field 'data.workers' is {workers}, whose batches of {size / 1e6:.4g} MB need {needed / 1e6:.4g} MB of "
            f"shared memory, and {_SHARED_MEMORY} has {free / 1e6:.4g} MB left; expected more of it (docker run "
            f"--shm-size={needed // 10**9 + 1}g), or data.workers=0, which reads in threads and needs none"
        )


def data_state(parts: Sequence[Part], mixture: Mixture, step: int) -> dict[str, Any]:
    """Where the batches of a mixture stand after `step` steps, and all that their order depends on besides; for JSON.

    Images do not count, nor where and in which file format a dataset lies: it may be moved or converted.

    Returns:
        next_step, next_sample: numbers of those to come, from 0.
        seed, batch_size, phases: of the mixture; phases are [first step, weights].
        datasets: by name the `number` in the mixture, how many `windows` and a hash of the episodes' `content`.
    """
    return {
        "next_step": step,
        "next_sample": step * mixture.batch_size,
        "seed": mixture.seed,
        "batch_size": mixture.batch_size,
        "phases": [[phase.first_step, list(phase.weights)] for phase in mixture.phases],
        "datasets": {
            part.name: {"number": number, "windows": len(part.windows), "content": part.windows.content}
            for number, part in enumerate(parts)
        },
    }


@dataclasses.dataclass(frozen=True)
class _SampleNumber:
    """Position in the stream of one process → position in the stream of all."""

    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, position: int) -> int:
        step, row = divmod(position, len(self.rows))
        return step * self.batch_size + self.rows[row]


class _Load:
    """Sample number → one row of a batch."""

    def __init__(
        self,
        parts: tuple[Part, ...],
        mixture: Mixture,
        text: "_Once",
        decoder: ActionDecoderConfig,
        skip_broken: bool,
        scales: bool,
        augmentation: Augmentation | None,
    ):
        self._parts, self._mixture, self._text, self._decoder, self._skip = parts, mixture, text, decoder, skip_broken
        self._scales, self._augmentation = scales, augmentation
        self._narrow = any(part.windows.action_dim not in (None, decoder.action_dim) for part in parts)
        self._skipped = itertools.count(1)  # threads may count at once

    def __call__(self, number: int) -> dict:
        dataset, window = self._mixture[number]
        part = self._parts[dataset]
        sample = self._read(part, window)
        if self._augmentation is not None:
            sample = self._augmentation(sample, number)
        sample["text"] = self._text(sample.pop("instruction"))
        if "actions" not in sample:
            return sample
        if part.normalizers is not None:
            sample["actions"] = part.normalizers["action"].normalize(sample["actions"])
            sample["proprio"] = part.normalizers["proprio"].normalize(sample["proprio"])
            if self._scales:
                scale = 1 / part.normalizers["action"].scale.astype(np.float32)
                sample["action_scale"] = pad_last(scale, self._decoder.action_dim)
        if self._narrow:
            sample["action_dims"] = np.arange(self._decoder.action_dim) < sample["actions"].shape[-1]
        if self._decoder.embodiments:
            sample["embodiment"] = np.int32(dataset if part.embodiment is None else part.embodiment)
        sample["actions"] = pad_last(sample["actions"], self._decoder.action_dim)
        sample["proprio"] = pad_last(sample["proprio"], self._decoder.proprio_dim)
        return sample

    def _read(self, part: Part, window: int) -> dict:
        for attempt in range(_ATTEMPTS):
            try:
                return part.windows[(window + attempt) % len(part.windows)]
            except DatasetError as error:
                if not self._skip or attempt == _ATTEMPTS - 1:
                    raise
                logging.warning("skipped a window (%d so far): %s", next(self._skipped), error)
        raise AssertionError("unreachable")


def _stack(samples: Sequence[dict]) -> Batch:
    """Rows → a batch."""
    arrays: dict[str, Any] = {name: np.stack([sample[name] for sample in samples]) for name in samples[0] if name != "video"}
    if "video" in samples[0]:
        video = buffers.empty((len(samples), *samples[0]["video"].shape))
        arrays["video"] = np.stack([sample["video"] for sample in samples], out=video)
    return make_batch(arrays)


class _FrameCache:
    """Decoded frames of a source, the most recently used ones kept within a number of bytes."""

    def __init__(self, capacity: int):
        self._capacity, self._used = capacity, 0
        self._frames: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()  # camera, episode, step
        self._lock = threading.Lock()

    def __reduce__(self):
        return _FrameCache, (self._capacity,)  # worker processes start with an empty cache

    def take(self, camera: str, episode: int, frames: Frames, indices: Sequence[int]) -> np.ndarray:
        if not self._capacity:
            return frames.take(indices)
        with self._lock:
            found = {i: self._frames[camera, episode, i] for i in indices if (camera, episode, i) in self._frames}
            for i in found:
                self._frames.move_to_end((camera, episode, i))
        missing = [i for i in dict.fromkeys(indices) if i not in found]
        if missing:  # decoded outside the lock, so threads decode in parallel
            taken = frames.take(missing)
            decoded = dict(zip(missing, taken, strict=True))
            self._keep(camera, episode, decoded)
            if missing == list(indices):
                return taken
            found |= decoded
        return np.stack([found[i] for i in indices])

    def _keep(self, camera: str, episode: int, decoded: Mapping[int, np.ndarray]) -> None:
        with self._lock:
            for i, frame in decoded.items():
                if (camera, episode, i) not in self._frames:
                    self._frames[camera, episode, i] = frame.copy()  # not a view that keeps its whole window alive
                    self._used += frame.nbytes
            while self._used > self._capacity:
                self._used -= self._frames.popitem(last=False)[1].nbytes


@dataclasses.dataclass(frozen=True)
class _CachedFrames:
    """`Frames` of one camera of one episode, through a `_FrameCache`."""

    cache: _FrameCache
    camera: str
    episode: int
    frames: Frames

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        return self.cache.take(self.camera, self.episode, self.frames, indices)


def _report(source: EpisodeSource, broken: Sequence[int], skip_broken: bool) -> None:
    """Of episodes that cannot be read, the first is an error; or they are left out and counted in the log."""
    for skipped, place in enumerate(broken, 1):
        try:
            source[place]
        except DatasetError as error:
            if not skip_broken:
                raise
            logging.warning("skipped an episode (%d so far): %s", skipped, error)


def _check_horizons(name: str, clocks: Sequence[np.ndarray], count: int, config: DataConfig, actions: bool) -> None:
    longest = max((clock[-1] - clock[0] for clock in clocks), default=0.0)
    spans = {"data.future_frames": (config.future_frames, np.ptp(video_times(0.0, config)))}
    if actions:
        spans["data.action_horizon"] = (config.action_horizon, action_times(0.0, config)[-1])
    for field, (value, span) in spans.items():
        if span > longest + TOLERANCE:
            raise DatasetError(
                f"config field '{field}' is {value}: its window spans {span:.2f} s, but the longest of "
                f"{count} episodes of {name} lasts {longest:.2f} s"
            )


class _Once:
    """Caches a function of text; the lock keeps two threads from computing the same. Worker processes start without its cache."""

    def __init__(self, function: Callable[[str], np.ndarray]):
        self._function, self._lock = function, threading.Lock()
        self._cached = functools.lru_cache(maxsize=_TEXT_CACHE)(function)

    def __call__(self, text: str) -> np.ndarray:
        with self._lock:
            return self._cached(text)

    def __reduce__(self):
        return _Once, (self._function,)
