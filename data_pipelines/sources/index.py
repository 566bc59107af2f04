"""What is known of a split without its images: where the records are, and every low-dimensional value of every step.

Built once, in several processes, and kept on disk as .npy files that are memory-mapped, so that a process's memory does not grow
with the dataset and workers share its pages. The cache is keyed by content: the dataset's metadata, the names, sizes and lengths
of the split's shards, and the columns; not by where the dataset lies. Who replaces a shard by another one of the same size has to
delete the index. An interrupted build continues with the shards that it lacks, and an index appears whole or not at all.

Of TFRecord shards the build touches the records' keys and the columns, so images are neither read nor verified; a record's
checksum is verified when its first frame is read. ArrayRecord verifies and reads a record as a whole, images included; they are
not decoded.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipelines.sources.records import DatasetError, Feature, TfRecordFile, is_remote, open_records, parse_example
from data_pipelines.workers import worker_processes
from mimic_video.atomic import atomically
from mimic_video.cache import user_cache

FOLDER = ".mimic_video_index"  # inside the dataset, where that can be written
_VERSION = 3  # of what is on disk
_BYTES_PER_PROCESS = 4 << 30  # fewer are indexed sooner than a process starts
_RECORD = np.dtype([("shard", "<i4"), ("record", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("steps", "<i8")])

_log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A file of a split, with the number of records that the dataset's metadata says it has, and its size in bytes."""

    path: str
    records: int
    size: int


class Column(NamedTuple):
    """A feature to keep, by its flattened path. `dtype` and `shape` are of one value, as the feature spec has them.

    Kinds:
        steps: numbers of every step, (steps, *shape).
        record: numbers of every record, (records, *shape).
        text: a string of every record, its first one: UTF-8, whose bytes up to the first zero may be stored as integers.
        texts: such a string of every step; on disk each is there once for all steps in a row that have it.
        count: nothing but how many steps there are, from a feature of bytes.
    """

    path: str
    kind: Literal["steps", "record", "text", "texts", "count"]
    dtype: str = "object"
    shape: tuple[int, ...] = ()
    encoding: Literal["none", "bytes", "zlib"] = "none"

    def decode(self, features: Mapping[str, Feature]) -> Any:
        """This column of one record: an array with a leading axis of steps, or one without for `record`; a string or several.

        Raises:
            ValueError: naming the feature, if the record lacks it or holds something else than the spec says.
        """
        if self.path not in features:
            raise ValueError(f"feature '{self.path}' is missing")
        try:
            return getattr(self, f"_{self.kind}")(features[self.path])
        except (ValueError, zlib.error) as error:
            raise ValueError(
                f"feature '{self.path}' is not what the dataset's features say ({self.dtype} {self.shape}): {error}"
            ) from error

    def _steps(self, feature: Feature) -> np.ndarray:
        return self._numbers(feature).reshape(-1, *self.shape)

    def _record(self, feature: Feature) -> np.ndarray:
        return self._numbers(feature).reshape(self.shape)

    def _count(self, feature: Feature) -> np.ndarray:
        return np.zeros((len(feature.strings()), 0), np.uint8)

    def _text(self, feature: Feature) -> str:
        return next(iter(self._texts(feature)), "")

    def _texts(self, feature: Feature) -> list[str]:
        if self.dtype == "object":
            encoded = [bytes(text) for text in feature.strings()]
        else:
            encoded = [bytes(row).partition(b"\0")[0] for row in feature.numbers().reshape(-1, *self.shape).tolist()]
        decoded = {text: text.decode() for text in set(encoded)}  # each is in memory once
        return [decoded[text] for text in encoded]

    def _numbers(self, feature: Feature) -> np.ndarray:
        if self.encoding == "none":
            values = feature.numbers()
            return values.view(np.uint64) if self.dtype == "uint64" else values.astype(self.dtype)
        unpack = zlib.decompress if self.encoding == "zlib" else bytes
        return np.frombuffer(b"".join(map(unpack, feature.strings())), self.dtype)


class Index:
    """The index of one split. May be pickled; arrays are mapped in each process when first used.

    Attributes:
        directory: where it is.
        records: structured (records,): `shard`, `record` within it, byte `offset` and `size` of TFRecord payloads, `steps`, which
            is 0 for a record that could not be read.

    Args:
        directory: of a finished index.
        continues: path of a `record` column of flags, if there is one: a record that has it continues the previous one's episode.
        ends: path of a `steps` column of flags, if there is one, that an episode's last step has.
    """

    def __init__(self, directory: Path, continues: str | None = None, ends: str | None = None):
        self.directory, self._continues, self._ends = directory, continues, ends

    def __len__(self) -> int:
        """Episodes."""
        return len(self._first_records) - 1

    @functools.cached_property
    def key(self) -> str:
        """Hex digits that change with the index, and with which records cannot be read."""
        return hashlib.sha256(self.directory.name.encode() + (self.directory / "index.json").read_bytes()).hexdigest()

    def steps(self, episodes: np.ndarray) -> np.ndarray:
        """int64, shaped as `episodes`: how many steps these have, and 0 for those of which no record could be read."""
        return self._first_steps[self._first_records[episodes + 1]] - self._first_steps[self._first_records[episodes]]

    def first_rows(self, path: str, episodes: np.ndarray) -> np.ndarray:
        """Of a `record` column what the first records of episodes have."""
        return np.asarray(self.column(path)[self._first_records[episodes]])

    def record_range(self, episode: int) -> tuple[int, int]:
        """First and one past the last record of an episode."""
        return int(self._first_records[episode]), int(self._first_records[episode + 1])

    def first_steps(self, first: int, last: int) -> np.ndarray:
        """int64 (last − first + 1,): where in a `steps` column those of records first to last − 1 begin, and where they end."""
        return self._first_steps[first : last + 1]

    def column(self, path: str) -> np.ndarray:
        """A `steps` or `record` column, memory-mapped."""
        return self._array(_file_name(path))

    def text(self, path: str, row: int) -> str:
        """Of a `text` column that of a record; of a `texts` column that of a run of steps that have the same."""
        start, stop = self._array(_file_name(path, "ends"))[row : row + 2]
        return bytes(self._array(_file_name(path, "text"))[start:stop]).decode()

    def texts(self, path: str, start: int, stop: int) -> tuple[str, ...]:
        """Of a `texts` column, those of steps start to stop − 1."""
        runs = self._array(_file_name(path, "runs"))
        first, last = int(np.searchsorted(runs, start, side="right")) - 1, int(np.searchsorted(runs, stop))
        lengths = np.diff(np.clip(runs[first : last + 1], start, stop)).tolist()
        repeated = (itertools.repeat(self.text(path, run), length) for run, length in enumerate(lengths, first))
        return tuple(itertools.chain.from_iterable(repeated))

    def error(self, first: int, last: int) -> str | None:
        """Why one of records first to last − 1 could not be read, if so."""
        return next((self._errors[r] for r in range(first, last) if r in self._errors), None) if self._errors else None

    @functools.cached_property
    def records(self) -> np.ndarray:
        return self._array("records.npy")

    @functools.cached_property
    def _errors(self) -> dict[int, str]:
        return {error["record"]: error["message"] for error in _read_json(self.directory / "index.json")["errors"]}

    @functools.cached_property
    def _first_records(self) -> np.ndarray:
        begins = np.ones(len(self.records), bool)
        if self._continues is not None:
            begins[1:] = ~self.column(self._continues)[1:].astype(bool)
            for record in sorted(self._errors):  # which cannot say itself whether it continues an episode
                begins[record] = record == 0 or self._ends_an_episode(record - 1)
        return np.append(np.flatnonzero(begins), len(begins))

    def _ends_an_episode(self, record: int) -> bool:
        step = int(self._first_steps[record + 1]) - 1
        return self._ends is not None and record not in self._errors and bool(self.column(self._ends)[step])

    @functools.cached_property
    def _first_steps(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.records["steps"])])

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {}

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.directory / name, mmap_mode="r")
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "_continues": self._continues, "_ends": self._ends}


def cache_directories(directory: str | os.PathLike, cache_dir: str | os.PathLike | None) -> list[Path]:
    """Where the index of a dataset may lie: `cache_dir`, or without it the dataset's own folder and the user's cache."""
    if cache_dir is not None:
        return [Path(cache_dir)]
    user = user_cache("index")
    return [user] if is_remote(directory) else [Path(directory) / FOLDER, user]


def open_index(
    shards: Sequence[Shard],
    file_format: str,
    columns: Sequence[Column],
    *,
    identity: bytes,
    name: str,
    directories: Sequence[Path],
) -> Path:
    """The folder of the split's index, which is built if none of `directories` has it; in the first that can be written.

    A record that cannot be read does not fail the build: the index says so, and looks at it again once its shard has changed. Of
    a shard that is truncated none can.

    Args:
        shards: of the split, in order.
        columns: at least one of the kind "steps" or "count".
        identity: what tells this dataset from others, besides its shards: its metadata.
        name: for messages.

    Raises:
        DatasetError: if no folder can be written.
    """
    columns = sorted(set(columns))
    content = [_VERSION, file_format, [(os.path.basename(s.path), s.records, s.size) for s in shards], columns]
    key = hashlib.sha256(identity + json.dumps(content).encode()).hexdigest()[:24]
    for folder in directories:
        if _is_current(folder / key, shards):
            return folder / key
    root = first_writable(directories)
    if root is None:
        places = " or ".join(map(str, directories))
        raise DatasetError(f"the index of {name} cannot be written to {places}; set XDG_CACHE_HOME to a folder where it can")
    with lock(root / f"{key}.lock"):
        if not _is_current(root / key, shards):
            shutil.rmtree(root / key, ignore_errors=True)
            _log.info("indexing %d records in %d shards of %s", sum(shard.records for shard in shards), len(shards), name)
            parts = root / f"{key}.parts"
            _index_shards(shards, file_format, columns, parts)
            with atomically(root / key) as building:
                _merge(parts, shards, columns, building)
            shutil.rmtree(parts)
    return root / key


def _index_shards(shards: Sequence[Shard], file_format: str, columns: Sequence[Column], parts: Path) -> None:
    parts.mkdir(exist_ok=True)
    jobs = [(shard, file_format, columns, _part(parts, i)) for i, shard in enumerate(shards) if not _part(parts, i).exists()]
    processes = min(os.cpu_count() or 1, len(jobs), sum(shard.size for shard, *_ in jobs) // _BYTES_PER_PROCESS)
    if processes < 2:
        for job in jobs:
            _index_shard(*job)
        return
    with worker_processes(processes) as executor:
        for future in concurrent.futures.as_completed([executor.submit(_index_shard, *job) for job in jobs]):
            future.result()


def _part(parts: Path, shard: int) -> Path:
    return parts / f"{shard:05d}.npz"


def _index_shard(shard: Shard, file_format: str, columns: Sequence[Column], part: Path) -> None:
    """Writes the records of one shard and their columns to the file `part`."""
    records = np.zeros(shard.records, _RECORD)
    records["record"] = np.arange(shard.records)
    rows: list[dict[Column, Any]] = []
    errors: dict[int, str] = {}
    try:
        file = open_records(shard.path, file_format)
        if len(file) != shard.records:
            raise DatasetError(f"shard {shard.path} is truncated or damaged: it has {len(file)} of its {shard.records} records")
        if isinstance(file, TfRecordFile):
            records["offset"], records["size"] = file.table.T
    except DatasetError as error:
        errors = dict.fromkeys(range(shard.records), str(error))
    for i in range(shard.records):
        row = {column: _absent(column) for column in columns}
        if i in errors:
            rows.append(row)
            continue
        try:
            features = parse_example(file.peek(i))
            row = {column: column.decode(features) for column in columns}
            records[i]["steps"] = _steps(row)
        except DatasetError as error:
            errors[i] = str(error)
        except ValueError as error:
            errors[i] = f"shard {shard.path}, record {i}: {error}"
        if i in errors:
            row = {column: _absent(column) for column in columns}
        rows.append(row)
    arrays: dict[str, np.ndarray] = {}
    for column in columns:
        values = [row[column] for row in rows]
        if column.kind == "texts":
            runs = [(text, sum(1 for _ in same)) for texts in values for text, same in itertools.groupby(texts)]
            arrays[_file_name(column.path, "runs")] = np.cumsum([length for _, length in runs], dtype=np.int64)
            values = [text for text, _ in runs]
        if column.kind in ("text", "texts"):
            encoded = [value.encode() for value in values]
            arrays[_file_name(column.path, "text")] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[_file_name(column.path, "ends")] = np.cumsum([len(value) for value in encoded], dtype=np.int64)
        elif column.kind != "count":
            arrays[_file_name(column.path)] = (np.concatenate if column.kind == "steps" else np.stack)(values)
    arrays |= {"records.npy": records, "errors.json": np.array(json.dumps(errors))}
    with atomically(part) as partial, partial.open("wb") as whole:
        np.savez(whole, allow_pickle=False, **arrays)


def _absent(column: Column) -> Any:
    if column.kind in ("text", "texts"):
        return "" if column.kind == "text" else []
    return np.zeros(column.shape if column.kind == "record" else (0, *column.shape), column.dtype)


def _steps(row: Mapping[Column, Any]) -> int:
    lengths = {column.path: len(values) for column, values in row.items() if column.kind in ("steps", "texts", "count")}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"its features have different numbers of steps: {lengths}")
    steps = next(iter(lengths.values()))
    if not steps:
        raise ValueError("it has no steps")
    return steps


def _merge(parts: Path, shards: Sequence[Shard], columns: Sequence[Column], target: Path) -> None:
    """Joins the shards' parts, one in memory at a time, in the folder `target`."""
    target.mkdir()
    records: list[np.ndarray] = []
    errors: list[dict[str, Any]] = []
    for i, shard in enumerate(shards):
        with np.load(_part(parts, i)) as part:
            first = sum(len(earlier) for earlier in records)
            records.append(part["records.npy"])
            errors += [
                {"record": first + int(record), "message": message, "shard": i, "changed": _changed(shard.path)}
                for record, message in json.loads(part["errors.json"].item()).items()
            ]
        records[-1]["shard"] = i
    np.save(target / "records.npy", np.concatenate(records))
    for column in columns:
        if column.kind in ("text", "texts"):
            _concatenate(parts, len(shards), _file_name(column.path, "text"), target)
            for what in ("ends", "runs") if column.kind == "texts" else ("ends",):
                _merge_ends(parts, len(shards), _file_name(column.path, what), target)
        elif column.kind != "count":
            _concatenate(parts, len(shards), _file_name(column.path), target)
    (target / "index.json").write_text(json.dumps({"version": _VERSION, "columns": columns, "errors": errors}, indent=1))


def _merge_ends(parts: Path, count: int, name: str, target: Path) -> None:
    ends, total = [np.zeros(1, np.int64)], 0
    for i in range(count):
        with np.load(_part(parts, i)) as part:
            ends.append(part[name] + total)
            total += int(part[name][-1:].sum())  # nothing, of a shard without any
    np.save(target / name, np.concatenate(ends))


def _concatenate(parts: Path, count: int, name: str, target: Path) -> None:
    shapes = []
    for i in range(count):
        with np.load(_part(parts, i)) as part:
            shapes.append(part[name].shape)
            dtype = part[name].dtype
    rows = sum(shape[0] for shape in shapes)
    if not rows or 0 in shapes[0][1:]:
        np.save(target / name, np.zeros((max(rows, 1), *shapes[0][1:]), dtype))  # an empty file cannot be mapped
        return
    merged = np.lib.format.open_memmap(target / name, mode="w+", dtype=dtype, shape=(rows, *shapes[0][1:]))
    first = 0
    for i, shape in enumerate(shapes):
        with np.load(_part(parts, i)) as part:
            merged[first : first + shape[0]] = part[name]
        first += shape[0]
    merged.flush()


def _is_current(directory: Path, shards: Sequence[Shard]) -> bool:
    """Whether the index is there, and no shard has changed that had records which could not be read."""
    try:
        errors = _read_json(directory / "index.json")["errors"]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a file that is damaged
        return False
    return all(_changed(shards[error["shard"]].path) == error["changed"] for error in errors)


def _changed(path: str) -> int | None:
    return None if is_remote(path) else os.stat(path).st_mtime_ns


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _file_name(path: str, what: str = "") -> str:
    return f"{path.replace('/', '.')}{what and '.' + what}.npy"


def first_writable(directories: Iterable[Path]) -> Path | None:
    """The first of these folders that is there, or can be made, and can be written to."""
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(directory, os.W_OK):
            return directory
    return None


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block, by a file; the others then find what the first has made."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)
