"""Record files of RLDS datasets and the tf.Examples in them, read in place: only what is asked for is touched.

A TFRecord file is a sequence of (uint64 length, masked crc32c of it, payload, masked crc32c of it). Read from a local path or a
mounted bucket it is memory-mapped, so that finding the records of a 200 MB shard reads a few kilobytes. A URL of fsspec
(`gs://…`, `s3://…`, `memory://…`) works where that protocol's package is installed: it fetches a shard whole to find its records,
and one record at a time afterwards. An ArrayRecord file must be local or mounted; a record of it can only be read whole.
"""

import functools
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
from array_record.python import array_record_module

_HEADER, _FOOTER = 12, 4  # bytes of a TFRecord before and after its payload
_ONE_AT_A_TIME = "readahead_buffer_size:0,max_parallelism:0"  # its threads would cost more than reading one record


class DatasetError(ValueError):
    """A dataset that cannot be used. The message names the dataset, what was found in it and what was expected."""


class RecordFile(Protocol):
    """The records of one shard. Thread-safe."""

    path: str

    def __len__(self) -> int: ...

    def peek(self, index: int) -> memoryview:
        """The record, unverified: nothing of it is read before it is looked at, where the format permits that."""
        ...

    def read(self, index: int) -> memoryview:
        """The record, its checksum verified. Raises DatasetError naming the file and the record."""
        ...


def open_records(path: str, file_format: str, table: np.ndarray | None = None) -> RecordFile:
    """Opens a shard of the format "tfrecord" or "array_record"; `table` as of `TfRecordFile`.

    Raises:
        DatasetError: for another format, or naming the file, if it is missing, remote where it must not be, or damaged.
    """
    if file_format == "tfrecord":
        return TfRecordFile(path, table)
    if file_format == "array_record":
        return ArrayRecordFile(path)
    raise DatasetError(f"shard {path} is stored as {file_format}; expected tfrecord or array_record")


class TfRecordFile:
    """A TFRecord file.

    Attributes:
        table: int64 (n, 2), the byte offset and the length of every record's payload.
        verified: one byte a record, not zero once its checksum has been verified.

    Args:
        path: local, or a URL of fsspec.
        table: of an earlier time; None finds the records, for which the payloads are not read.

    Raises:
        DatasetError: if the file is missing, or, without `table`, naming the record that is damaged or cut short.
    """

    def __init__(self, path: str, table: np.ndarray | None = None):
        self.path = path
        self._size = file_size(path)
        self._data: memoryview | None = None
        if not is_remote(path):
            self._data = _map(path, self._size)
            if table is None and self._size:
                _advise(self._data, mmap.MADV_RANDOM)  # or the kernel would read the images along with what lies before them
        elif table is None:
            self._data = memoryview(_file_system(path).cat_file(path))
        self.table = np.array(list(self._walk()), np.int64).reshape(-1, 2) if table is None else table
        self.verified = bytearray(len(self.table))

    def __len__(self) -> int:
        return len(self.table)

    def peek(self, index: int) -> memoryview:
        offset, size = self.table[index].tolist()
        return self._bytes(index, offset, offset + size)

    def read(self, index: int) -> memoryview:
        """As `RecordFile.read`. The checksum covers the whole record, so the first read of each reads all of it."""
        offset, size = self.table[index].tolist()
        data = self._bytes(index, offset, offset + size + _FOOTER)
        payload = data[:size]
        if not self.verified[index]:
            if self._data is not None:
                _advise(self._data, mmap.MADV_WILLNEED, offset, size)
            if _masked_crc(payload) != _uint32(data[size:]):
                raise DatasetError(f"shard {self.path}, record {index}: its checksum does not match")
            self.verified[index] = self._data is not None  # what is fetched anew is verified anew
        return payload

    def _bytes(self, index: int, start: int, stop: int) -> memoryview:
        if stop > self._size:
            raise DatasetError(f"shard {self.path}, record {index}: the file of {self._size} bytes ends within it")
        if self._data is not None:
            return self._data[start:stop]
        return memoryview(_file_system(self.path).cat_file(self.path, start, stop))

    def _walk(self) -> Iterator[tuple[int, int]]:
        assert self._data is not None
        position = index = 0
        while position < self._size:
            header = self._data[position : position + _HEADER]
            if len(header) < _HEADER:
                raise DatasetError(f"shard {self.path}, record {index}: the file of {self._size} bytes ends within it")
            if _masked_crc(header[:8]) != _uint32(header[8:]):
                raise DatasetError(
                    f"shard {self.path}, record {index} at byte {position}: the checksum of its length does not match"
                )
            (size,) = struct.unpack("<Q", header[:8])
            self._bytes(index, position, position + _HEADER + size + _FOOTER)
            yield position + _HEADER, size
            position += _HEADER + size + _FOOTER
            index += 1


class ArrayRecordFile:
    """An ArrayRecord file at a local path. Its reader decompresses and verifies a record as a whole."""

    def __init__(self, path: str):
        if is_remote(path):
            raise DatasetError(f"shard {path}: ArrayRecord files are read from local or mounted paths only")
        self.path = path
        file_size(path)
        self._reader = self._open()
        self._lock = threading.Lock()  # a position is set and then read from
        self._count = self._reader.num_records()  # 0 for a truncated file

    def __len__(self) -> int:
        return self._count

    def peek(self, index: int) -> memoryview:
        return self.read(index)

    def read(self, index: int) -> memoryview:
        with self._lock:
            try:
                self._reader.seek(index)
                return memoryview(self._reader.read())
            except Exception as error:  # undocumented
                self._reader = self._open()  # after a damaged record, a reader repeats its error for all of them
                raise DatasetError(f"shard {self.path}, record {index} cannot be read: {error}") from error

    def _open(self) -> Any:
        return array_record_module.ArrayRecordReader(self.path, _ONE_AT_A_TIME)


class RecordWriter:
    """Writes a shard; what it wrote counts once it is closed. A context manager."""

    def __init__(self, path: str | os.PathLike, file_format: str):
        self.count, self.num_bytes = 0, 0
        if file_format == "tfrecord":
            self._file: Any = open(path, "wb")  # noqa: SIM115  # closed by close()
            self._write: Callable[[bytes], Any] = self._frame
        elif file_format == "array_record":
            # One record a group: a reader decompresses no other. JPEGs do not get smaller by compressing them again.
            self._file = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
            self._write = self._file.write
        else:
            raise ValueError(f"file_format is {file_format!r}; expected tfrecord or array_record")

    def write(self, record: bytes) -> None:
        self._write(record)
        self.count += 1
        self.num_bytes += len(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _frame(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        for part in (length, struct.pack("<I", _masked_crc(length)), record, struct.pack("<I", _masked_crc(record))):
            self._file.write(part)


class RecordFiles:
    """The shards of a split, opened when needed; only the most recently used ones stay open. Thread-safe.

    Args:
        paths: of the shards.
        file_format: "tfrecord" or "array_record".
        table: of a shard by its number, as of `TfRecordFile`.
    """

    _OPEN = 128  # far below the usual limit of 1024 files of a process; opening one again takes microseconds

    def __init__(self, paths: Sequence[str], file_format: str, table: Callable[[int], np.ndarray]):
        self._paths, self._format, self._table = paths, file_format, table
        self._verified: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._opened = functools.lru_cache(maxsize=self._OPEN)(self._open)

    def __getitem__(self, shard: int) -> RecordFile:
        with self._lock:
            return self._opened(shard)

    def _open(self, shard: int) -> RecordFile:
        file = open_records(self._paths[shard], self._format, self._table(shard))
        if isinstance(file, TfRecordFile):
            file.verified = self._verified.setdefault(shard, file.verified)
        return file


# Files


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL for fsspec rather than a local path."""
    return "://" in os.fspath(path)


def file_size(path: str) -> int:
    """Bytes of a local or remote file. Raises DatasetError naming it if there is none."""
    try:
        return _file_system(path).info(path)["size"] if is_remote(path) else os.stat(path).st_size
    except FileNotFoundError as error:
        raise DatasetError(f"shard {path} is missing") from error


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Bytes of files of one folder; a remote folder is listed once. Raises DatasetError naming a file that is missing."""
    if not paths or not is_remote(paths[0]):
        return [file_size(path) for path in paths]
    folder = paths[0].rpartition("/")[0]
    sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in _file_system(folder).ls(folder, detail=True)}
    for path in paths:
        if path.rpartition("/")[2] not in sizes:
            raise DatasetError(f"shard {path} is missing")
    return [sizes[path.rpartition("/")[2]] for path in paths]


def read_file(path: str) -> bytes:
    """A whole local or remote file. Raises FileNotFoundError."""
    if is_remote(path):
        return _file_system(path).cat_file(path)
    with open(path, "rb") as file:
        return file.read()


def _file_system(path: str) -> Any:
    try:
        import fsspec  # only here: local datasets do not need it

        return fsspec.url_to_fs(path)[0]
    except (ImportError, ValueError) as error:  # fsspec or the protocol's package is missing; an unknown protocol
        raise DatasetError(f"{path} cannot be opened: {error}") from error


def _map(path: str, size: int) -> memoryview:
    if not size:
        return memoryview(b"")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def _advise(data: memoryview, advice: int, start: int = 0, size: int | None = None) -> None:
    """Tells the kernel how a mapped file will be read; other memory is left alone."""
    if isinstance(data.obj, mmap.mmap):
        first = start - start % mmap.PAGESIZE
        data.obj.madvise(advice, first, (len(data) if size is None else start + size) - first)


def _masked_crc(data: bytes | memoryview) -> int:
    crc = google_crc32c.value(np.frombuffer(data, np.uint8) if len(data) else b"")
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _uint32(data: memoryview) -> int:
    return struct.unpack("<I", data)[0]


# tf.Example, whose wire format is protobuf's:
#   Example {1: Features {1: repeated entry {1: key, 2: Feature {1: BytesList | 2: FloatList | 3: Int64List {1: values}}}}}

_BYTES, _FLOATS, _INTS = 1, 2, 3


class Feature(NamedTuple):
    """One feature of a tf.Example; `data` is the list of its values as it is stored."""

    kind: int
    data: memoryview

    @property
    def is_bytes(self) -> bool:
        return self.kind == _BYTES

    def numbers(self) -> np.ndarray:
        """float32 or int64 (k,). Raises ValueError if it holds bytes or is not stored packed."""
        if self.is_bytes:
            raise ValueError("it holds bytes; expected numbers")
        parts = [np.zeros(0, np.int64 if self.kind == _INTS else np.float32)]
        for _, packed in _fields(self.data):
            if isinstance(packed, int):
                raise ValueError("its numbers are not packed, an encoding that TensorFlow does not write")
            parts.append(_varints(np.frombuffer(packed, np.uint8)) if self.kind == _INTS else np.frombuffer(packed, "<f4"))
        return np.concatenate(parts)

    def strings(self, count: int | None = None) -> list[memoryview]:
        """The byte strings, or the first `count` of them, as slices. Raises ValueError if it holds numbers."""
        if not self.is_bytes:
            raise ValueError("it holds numbers; expected bytes")
        found: list[memoryview] = []
        for _, value in _fields(self.data):
            if len(found) == count:
                break
            if isinstance(value, int):
                raise ValueError("it is not a list of bytes")
            found.append(value)
        return found


def parse_example(example: memoryview) -> dict[str, Feature]:
    """The features of a tf.Example by their flattened keys, e.g. "steps/observation/image_0".

    Only keys and lengths are looked at: of the values, nothing is touched before they are asked for.

    Raises:
        ValueError: if the bytes are not a tf.Example.
    """
    found = {}
    for number, features in _messages(example):
        if number != 1:
            continue
        for _, entry in _messages(features):
            parts = dict(_messages(entry))
            if 1 not in parts:
                raise ValueError("it is not a tf.Example: a feature has no key")
            for kind, values in _messages(parts.get(2, memoryview(b""))):
                found[str(parts[1], "utf-8", "replace")] = Feature(kind, values)
    return found


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    for number, value in _fields(data):
        if isinstance(value, int):
            raise ValueError(f"it is not a tf.Example: its field {number} is a number")
        yield number, value


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, value) of the fields of a protobuf message; values of fields that have no length are the integer 0."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        wire = tag & 7
        size = 0
        if wire == 2:
            size, position = _varint(data, position)
        elif wire == 0:
            _, position = _varint(data, position)
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise ValueError(f"it is not a tf.Example: unknown wire type {wire}")
        if position + size > end:
            raise ValueError("it is not a tf.Example: a field is longer than its message")
        yield tag >> 3, data[position : position + size] if wire == 2 else 0
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    for i in range(position, min(position + 10, len(data))):
        byte = data[i]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, i + 1
        shift += 7
    raise ValueError("it is not a tf.Example: an integer does not end")


def _varints(data: np.ndarray) -> np.ndarray:
    """int64 values of consecutive varints: 7 bits a byte, the lowest first; the high bit says that another byte follows."""
    last = data < 0x80
    if last.all():
        return data.astype(np.int64)
    if not last[-1]:
        raise ValueError("its last integer does not end")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= 10:
        raise ValueError("one of its integers has more than 64 bits")
    shifts = 7 * (np.arange(len(data)) - np.repeat(starts, ends - starts + 1))
    return np.add.reduceat((data & 0x7F).astype(np.uint64) << shifts.astype(np.uint64), starts).view(np.int64)
