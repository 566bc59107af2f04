"""Datasets → an endless stream of training batches whose N-th one is a function of (seed, N)."""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from data_pipelines.episode import Episode
from data_pipelines.sources.rlds import DatasetError, RldsSource
from data_pipelines.windows import TOLERANCE, action_times, action_window, anchors, video_times, video_window
from mimic_video.config import ConfigError, DataConfig, ExperimentConfig
from mimic_video.transforms import Normalizer

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)  # whole batches; JPEG decoding releases the interpreter lock
_TEXT_CACHE = 256  # instructions; 2 MB each at 512 rows of 1024


def check_dataset(source: RldsSource, config: ExperimentConfig) -> None:
    """Checks a dataset against the experiment, before anything is read.

    Raises:
        DatasetError: naming the dataset, the field and both values, if the image size, or for the stage `action` the action or
            proprio width, is not what the configuration says.
    """
    _require_equal(source, "image size", source.image_size, "data.image_size", tuple(config.data.image_size))
    if config.stage == "action":
        _require_equal(source, "action width", source.action_dim, "decoder.action_dim", config.decoder.action_dim)
        _require_equal(source, "proprio width", source.proprio_dim, "decoder.proprio_dim", config.decoder.proprio_dim)


def open_windows(config: ExperimentConfig, split: str) -> "WindowDataset":
    """The windows of one split of the dataset that the configured stage learns from.

    Raises:
        ConfigError: if the configuration names no dataset for the stage.
        DatasetError: if the dataset or split is not there, or `check_dataset` or `WindowDataset` refuses it.
    """
    directory = {"video": config.data.video_dataset, "action": config.data.action_dataset}[config.stage]
    if not directory:
        raise ConfigError(f"config field 'data.{config.stage}_dataset' is empty; expected a prepared RLDS directory")
    source = RldsSource(directory, split)
    check_dataset(source, config)
    return WindowDataset(source, config.data, actions=config.stage == "action")


def _require_equal(source: RldsSource, what: str, found: object, field: str, wanted: object) -> None:
    if found is None:
        raise DatasetError(f"{source.name} has no {what.split()[0]}; the config field '{field}' is {wanted}")
    if found != wanted:
        raise DatasetError(f"{source.name} has {what} {found}; the config field '{field}' is {wanted}")


class WindowDataset(Sequence[dict]):
    """Every window of a source's episodes, in order: episode by episode, anchor by anchor.

    Reads each episode once to keep what is not an image; frames are decoded when a window needs them and kept in
    `config.frame_cache_mb` megabytes. Thread-safe.

    Attributes:
        episodes: all episodes, their frames read through the cache.

    Args:
        source: the episodes.
        config: the window.
        actions: whether windows carry proprio and actions (the stage `action`) or only video.

    Raises:
        DatasetError: if the source's images have another size than `config.image_size`, if it lacks actions or proprio that are
            asked for, or if even its longest episode is shorter than the window.
    """

    def __init__(self, source: RldsSource, config: DataConfig, *, actions: bool):
        _require_equal(source, "image size", source.image_size, "data.image_size", tuple(config.image_size))
        if actions and (source.action_dim is None or source.proprio_dim is None):
            missing = "action" if source.action_dim is None else "proprio"
            raise DatasetError(f"{source.name} has no {missing}; windows with actions need both action and proprio")
        self._config, self._actions = config, actions
        cache = _FrameCache(source, config.frame_cache_mb * 2**20)
        self.episodes = [dataclasses.replace(episode, frames=_CachedFrames(cache, index, len(episode)))
                         for index, episode in enumerate(source)]
        _check_horizons(source.name, self.episodes, config, actions)
        steps = [anchors(episode.timestamps, config, actions=actions) for episode in self.episodes]
        self._episode_of = np.repeat(np.arange(len(steps)), [len(s) for s in steps])
        self._anchor_of = np.concatenate(steps)

    def __len__(self) -> int:
        return len(self._anchor_of)

    def __getitem__(self, index: int) -> dict:  # type: ignore[override]  # no slices
        """One window: `instruction` (str) and the arrays of `video_window`, and of `action_window` if it has actions."""
        episode, anchor = self.episodes[self._episode_of[index]], self._anchor_of[index]
        sample = {"instruction": episode.instruction, **video_window(episode, anchor, self._config)}
        if self._actions:
            sample |= action_window(episode, anchor, self._config)
        return sample


def make_batches(dataset: WindowDataset, *, batch_size: int, seed: int, start_step: int, text: Callable[[str], np.ndarray],
                 normalizers: Mapping[str, Normalizer] | None, process_index: int = 0, process_count: int = 1) -> Iterator[dict]:
    """This process's share of an endless stream of batches, made ahead in background threads.

    Every epoch visits every window once, in an order drawn from the seed; batches run across epochs' ends. The global batch of a
    step depends on (seed, step) alone: not on `start_step` nor, up to the order of its rows, on `process_count`.

    Args:
        dataset: the windows.
        batch_size: global; every process gets batch_size / process_count = b rows.
        seed: of the shuffling, 0 to 2³²−1.
        start_step: the step of the first batch, to resume there.
        text: instruction → float32 (rows, width); called once for an instruction (the last 256 are kept).
        normalizers: for the keys "action" and "proprio"; None leaves raw units.

    Returns:
        Iterator of dicts: `video` uint8 (b, past+future, H, W, 3), `video_mask` bool (b, past+future), `text` float32
        (b, rows, width); for a dataset with actions also `proprio` (b, 1, p), `actions` (b, A, m) and `action_mask` bool (b, A).

    Raises:
        ValueError: if `batch_size` cannot be divided, or a normaliser is missing.
    """
    if batch_size % process_count or batch_size < 1:
        raise ValueError(f"train.batch_size is {batch_size}; expected a multiple of the {process_count} processes")
    if normalizers is not None and set(normalizers) != {"action", "proprio"}:
        raise ValueError(f"normalizers are for {sorted(normalizers)}; expected action and proprio")
    embed = _once(text)

    def load(index: int) -> dict:
        sample = dataset[index]
        sample["text"] = embed(sample.pop("instruction"))
        if normalizers is not None and "actions" in sample:
            sample["actions"] = normalizers["action"].normalize(sample["actions"])
            sample["proprio"] = normalizers["proprio"].normalize(sample["proprio"])
        return sample

    batches = (
        grain.MapDataset.range(len(dataset))
        .shuffle(seed)
        .repeat()  # reshuffles every epoch
        .slice(slice(process_index, None, process_count))
        .map(load)
        .batch(batch_size // process_count)
    )
    return iter(batches[start_step:].to_iter_dataset(_READ))


class _FrameCache:
    """Decoded frames of a source, the most recently used ones kept within a number of bytes."""

    def __init__(self, source: Sequence[Episode], capacity: int):
        self._source, self._capacity, self._used = source, capacity, 0
        self._frames: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, episode: int, indices: Sequence[int]) -> np.ndarray:
        with self._lock:
            found = {i: self._frames[episode, i] for i in indices if (episode, i) in self._frames}
            for i in found:
                self._frames.move_to_end((episode, i))
        missing = [i for i in dict.fromkeys(indices) if i not in found]
        if missing:  # decoded outside the lock, so threads decode in parallel
            decoded = dict(zip(missing, self._source[episode].frames.take(missing), strict=True))
            found |= decoded
            self._keep(episode, decoded)
        return np.stack([found[i] for i in indices])

    def _keep(self, episode: int, decoded: Mapping[int, np.ndarray]) -> None:
        with self._lock:
            for i, frame in decoded.items():
                if (episode, i) not in self._frames:
                    self._frames[episode, i] = frame.copy()  # not a view that keeps its whole window alive
                    self._used += frame.nbytes
            while self._used > self._capacity:
                self._used -= self._frames.popitem(last=False)[1].nbytes


@dataclasses.dataclass(frozen=True)
class _CachedFrames:
    """`Frames` of one episode of a `_FrameCache`."""

    cache: _FrameCache
    episode: int
    length: int

    def __len__(self) -> int:
        return self.length

    def take(self, indices: Sequence[int]) -> np.ndarray:
        return self.cache.take(self.episode, indices)


def _check_horizons(name: str, episodes: Sequence[Episode], config: DataConfig, actions: bool) -> None:
    longest = max((episode.timestamps[-1] - episode.timestamps[0] for episode in episodes), default=0.0)
    spans = {"data.future_frames": (config.future_frames, np.ptp(video_times(0.0, config)))}
    if actions:
        spans["data.action_horizon"] = (config.action_horizon, action_times(0.0, config)[-1])
    for field, (value, span) in spans.items():
        if span > longest + TOLERANCE:
            raise DatasetError(f"config field '{field}' is {value}: its window spans {span:.2f} s, but the longest of "
                               f"{len(episodes)} episodes of {name} lasts {longest:.2f} s")


def _once(function: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Caches the function; the lock keeps two threads from computing the same text."""
    cached, lock = functools.lru_cache(maxsize=_TEXT_CACHE)(function), threading.Lock()

    def call(text: str) -> np.ndarray:
        with lock:
            return cached(text)

    return call
