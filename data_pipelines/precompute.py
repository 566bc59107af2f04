"""Latents of windows, computed once by a frozen tokenizer and read in place of frames.

    FOLDER/DATASET/SPLIT/manifest.json   what the latents were made of, and how they are stored
    FOLDER/DATASET/SPLIT/00000.npy, …    shards: (rows, t, v·h, w, c), the latents of v cameras one above the other

Its rows are the windows anchored at every `stride`-th step of each episode, beginning with the first, episode by episode. A shard
appears whole or not at all, so that several processes can fill one folder and an interrupted one continues. The manifest's key
names all that latents depend on; latents with another key than an experiment's are refused. Slices of a split share its latents:
those of `train[:50]` are in the folder `train`, which need not have the shards of other episodes.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import ml_dtypes  # noqa: F401  # teaches NumPy the name "bfloat16"
import numpy as np
from absl import logging

from data_pipelines.episode import Episode
from data_pipelines.sources.records import DatasetError
from data_pipelines.windows import video_window
from mimic_video.atomic import atomically
from mimic_video.config import ConfigError, ExperimentConfig, shaping, value_at
from mimic_video.progress import progress

SHARD_BYTES = 2**28  # in memory until they are written, and lost to an interruption
_MANIFEST = "manifest.json"
_DIGESTS = {"weights": "another tokenizer made them", "dataset": "they are of another dataset, or of another version of it"}


class Chosen(NamedTuple):
    """Episodes of a split whose windows are read: `places` among all of those that latents are of, which have so many steps."""

    steps: Sequence[int]
    places: Sequence[int]

    def rows(self, stride: int) -> np.ndarray:
        """int64 (places, 2): of each episode the row of its first window, and one past that of its last."""
        first = first_rows(self.steps, stride)
        return np.stack([first[:-1], first[1:]], axis=1)[np.asarray(self.places, int)]


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Latents of one split of a dataset, on disk. Thread-safe; may be pickled.

    Attributes:
        folder: of this split.
        key: what the latents were made of, as `latent_key` has it.
        stride: steps of an episode from one window to the next.
        rows: how many windows there are.
        shape: (t, v·h, w, c) of a window's latents, as they are stored.
        dtype: "float32" or "bfloat16".
        shard_rows: windows of each shard; the last one may have fewer.
    """

    folder: Path
    key: Mapping[str, Any]
    stride: int
    rows: int
    shape: tuple[int, ...]
    dtype: str
    shard_rows: int

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def shards_of(self, chosen: Chosen) -> set[int]:
        """Numbers of the shards that hold windows of episodes."""
        rows = (range(first, last) for first, last in chosen.rows(self.stride).tolist())
        return {shard for each in rows for shard in range(each[0] // self.shard_rows, each[-1] // self.shard_rows + 1)}

    def missing(self, shards: Iterable[int] | None = None) -> list[int]:
        """Numbers of those shards, by default of all, that are not there, or were cut short by a copy."""
        return [shard for shard in sorted(range(self.num_shards) if shards is None else shards) if not self._is_whole(shard)]

    def write(self, shards: Sequence[int], latents: Iterator[np.ndarray]) -> None:
        """Writes shards, given the latents (v, t, h, w, c) of all of their windows in order."""
        for shard in shards:
            values = np.empty((len(self.rows_of(shard)), *self.shape), self.dtype)
            for row in values:
                row[:] = np.concatenate(list(next(latents)), axis=1)
            _write_whole(self._path(shard), values.view(_stored(self.dtype)))

    def __getitem__(self, row: int) -> np.ndarray:
        """Latents (v, t, h, w, c) of a window. Raises DatasetError if its shard is damaged, or its frames could not be read."""
        shard, place = divmod(row, self.shard_rows)
        try:
            # Opened for each window: little beside reading one, and a large cache has more shards than files may be open.
            latents = np.array(self._open(shard)[place]).view(self.dtype)
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise DatasetError(f"shard {self._path(shard)} of precomputed latents cannot be read: {error}") from error
        if np.isnan(latents.flat[0]):
            raise DatasetError(f"shard {self._path(shard)} has no latents of window {place}: its frames could not be read")
        return np.stack(np.split(latents, len(self.key["data.cameras"]), axis=1))

    def _open(self, shard: int) -> np.ndarray:
        return np.load(self._path(shard), mmap_mode="r")

    def _is_whole(self, shard: int) -> bool:
        try:
            return self._open(shard).shape == (len(self.rows_of(shard)), *self.shape)
        except (OSError, ValueError, EOFError):
            return False

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"


def latent_key(config: ExperimentConfig, tokenizer: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """All that the latents of a dataset's windows depend on, in types of JSON.

    Args:
        config: the experiment.
        tokenizer: nested dict of its parameters, in the dtype that it computes in.
        dataset: the `identity` of a `WindowDataset`.
    """
    weights = hashlib.sha256()
    for name, leaf in sorted(_leaves(tokenizer, "")):
        weights.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode() + leaf.tobytes())
    exact = config.tokenizer.network.exact
    values = ((name, value_at(config, name)) for name in (shaping("latents") if exact else shaping("latents", "rounded_latents")))
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
    return fields | {"weights": weights.hexdigest(), "dataset": dataset}


def first_rows(lengths: Sequence[int] | np.ndarray, stride: int) -> np.ndarray:
    """int64 (episodes + 1,): the row of the first window of each episode, given their steps; and the number of rows."""
    return np.concatenate([[0], np.cumsum(-(-np.asarray(lengths, np.int64) // stride))])


def create_latents(
    folder: Path, key: Mapping[str, Any], *, stride: int, rows: int, shape: tuple[int, ...], dtype: str
) -> LatentCache:
    """A cache to be filled: that of the folder, or a new one. Arguments are the attributes of `LatentCache`.

    Raises:
        ConfigError: saying what differs, if the folder has latents with another key or stride.
        DatasetError: if its manifest is damaged.
    """
    if not (folder / _MANIFEST).exists():
        row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        manifest = {
            "key": key,
            "stride": stride,
            "rows": rows,
            "shape": shape,
            "dtype": dtype,
            "shard_rows": max(1, SHARD_BYTES // row_bytes),
        }
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
    cache = _read(folder)
    _require_same(cache, key)
    if cache.stride != stride:
        raise ConfigError(f"{folder} has latents at --stride={cache.stride}, not {stride}; name another folder or delete it")
    return cache


def fill_latents(
    cache: LatentCache,
    shards: Sequence[int],
    episodes: Sequence[Episode],
    config: ExperimentConfig,
    encode: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Makes shards of a cache, with a progress bar. Of windows that `data.skip_broken` skips the latents are NaN.

    Args:
        episodes: those of the cache.
        encode: frames uint8 (`train.batch_size`, v, f, H, W, 3) → their latents.

    Raises:
        DatasetError: if a frame cannot be read, without `data.skip_broken`.
    """
    rows = [row for shard in shards for row in cache.rows_of(shard)]

    def latents() -> Iterator[np.ndarray]:
        with progress(total=len(rows), desc=str(cache.folder), unit="window") as bar:
            for batch in _read_batches(rows, cache.stride, episodes, config):
                encoded = encode(batch["video"])
                encoded[batch["broken"]] = np.nan
                bar.update(min(len(encoded), len(rows) - bar.n))
                yield from encoded

    cache.write(shards, latents())


def _read_batches(rows: Sequence[int], stride: int, episodes: Sequence[Episode], config: ExperimentConfig) -> Iterator[dict]:
    """`video` and `broken` (b,) of those rows of a cache, read ahead by threads; the last row fills up the last batch."""
    first, size, shape = first_rows(list(map(len, episodes)), stride), config.train.batch_size, config.data.image_size

    def read(row: int) -> dict:
        episode = int(np.searchsorted(first, row, side="right")) - 1
        try:
            video = video_window(episodes[episode], (row - int(first[episode])) * stride, config.data)["video"]
        except DatasetError as error:
            if not config.data.skip_broken:
                raise
            logging.warning("skipped a window: %s", error)
            return {"video": np.zeros((config.data.views, config.data.num_frames, *shape, 3), np.uint8), "broken": True}
        return {"video": video, "broken": False}

    padded = [*rows, *[rows[-1]] * (-len(rows) % size)]
    ahead = grain.ReadOptions(num_threads=min(16, os.cpu_count() or 1), prefetch_buffer_size=size)
    return iter(grain.MapDataset.source(padded).map(read).to_iter_dataset(ahead).batch(size))


def open_latents(folder: Path, key: Mapping[str, Any], chosen: Chosen | None = None) -> LatentCache:
    """The cache of a folder, which has at least the latents of the chosen episodes, by default all.

    Raises:
        ConfigError: saying what differs, if its key is another.
        DatasetError: naming what is missing or damaged.
    """
    if not (folder / _MANIFEST).exists():
        raise DatasetError(f"there are no precomputed latents in {folder}: launch/precompute_latents.py makes them")
    cache = _read(folder)
    _require_same(cache, key)
    shards = range(cache.num_shards) if chosen is None else cache.shards_of(chosen)
    if missing := cache.missing(shards):
        names = ", ".join(f"{shard:05d}.npy" for shard in missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DatasetError(
            f"the precomputed latents in {folder} lack {len(missing)} of {len(shards)} shards ({names}): "
            "launch/precompute_latents.py continues them"
        )
    return cache


def _require_same(cache: LatentCache, key: Mapping[str, Any]) -> None:
    differences = [
        _DIGESTS.get(name, f"config field '{name}' is {key.get(name)!r}, there {cache.key.get(name)!r}")
        for name in dict.fromkeys((*key, *cache.key))
        if key.get(name) != cache.key.get(name)
    ]
    if differences:
        raise ConfigError(f"the precomputed latents in {cache.folder} do not fit this experiment: {'; '.join(differences)}")


def _read(folder: Path) -> LatentCache:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return LatentCache(folder, **manifest | {"shape": tuple(manifest["shape"])})
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{folder / _MANIFEST} of precomputed latents cannot be read: {error!r}") from error


def _write_whole(path: Path, content: np.ndarray | bytes) -> None:
    """Writes a file that is whole or absent, whoever else writes it."""
    with atomically(path) as partial, partial.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content)


def _stored(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype  # .npy files would forget what bfloat16 is


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield path + name, np.asarray(value)
