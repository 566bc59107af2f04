"""Where run directories can be: on a file system, or in a bucket of Google Cloud Storage.

`run_path` makes the path of either kind; it has the methods of pathlib.Path, and orbax writes to both. Objects in a bucket appear
whole or not at all, but cannot grow, and no library but orbax writes them: what does either goes through a `Spool`.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from absl import logging
from etils import epath

from mimic_video.config import expanded_path

# etils asks once, with its first path: where TensorFlow is installed, buckets are its business otherwise, and it is imported.
os.environ.setdefault("EPATH_USE_TF", "false")

_BUCKETS = "gs://"
_BEAT, _SILENCE, _SETTLING = 5.0, 20.0, 2.0  # seconds; other processes wait meanwhile, gloo no longer than 30
_OUT_OF_DATE = 60.0  # seconds: nobody waits while it is looked at, and clocks differ


class RunError(RuntimeError):
    """A run directory that is missing something, belongs to another experiment, or cannot be read or written."""


def run_path(path: str | os.PathLike) -> epath.Path:
    """Where a run is: a directory, or `gs://BUCKET/FOLDER`.

    Raises:
        RunError: if it is a URL of another kind, or the package for buckets is missing.
    """
    text = expanded_path(os.fspath(path), "the directory of a run")
    if in_bucket(text):
        if importlib.util.find_spec("gcsfs") is None:
            raise RunError(
                f"{text} is in a bucket, but the package gcsfs is missing; expected after pip install 'mimic-video-jax[gcs]'"
            )
        import fsspec  # only here: gcsfs brings it

        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other processes write there, too
    elif "://" in text:
        raise RunError(f"{text} is no place for a run; expected a directory or {_BUCKETS}BUCKET/FOLDER")
    return epath.Path(text)


def local_path(path: str | os.PathLike) -> pathlib.Path:
    """Where a directory is that cannot be in a bucket. Raises RunError if it is a URL."""
    text = expanded_path(os.fspath(path), "a directory")
    if "://" in text:
        raise RunError(f"{text} is a URL; expected a directory on this machine, to be copied there or from there")
    return pathlib.Path(text)


def in_bucket(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(_BUCKETS)


def absolute(path: str | os.PathLike) -> epath.Path:
    """As orbax wants it. (The path's own method takes a bucket for a directory.)"""
    return epath.Path(path if in_bucket(path) else os.path.abspath(path))


def read_whole(path: epath.Path) -> bytes:
    """The content of a file that another process may be writing anew: as it was, or as it is after that.

    Of an object in a bucket, the path's own methods ask for the size, then for so many bytes, which may be a part of another one.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not in_bucket(path):
        return path.read_bytes()
    import fsspec  # only here: gcsfs brings it

    return fsspec.filesystem("gcs").cat_file(os.fspath(path))


@contextlib.contextmanager
def in_words(path: str | os.PathLike, what: str = "read or written") -> Iterator[None]:
    """Makes RunErrors of what a bucket's client raises, which is of many kinds: `path` cannot be `what`."""
    try:
        yield
    except Exception as error:
        raise RunError(f"{path} cannot be {what}: {error!r}") from error


@contextlib.contextmanager
def repeating(action: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """Calls a function every so many seconds, in a thread of that name, until the block ends."""
    ending = threading.Event()

    def repeat() -> None:
        while not ending.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@contextlib.contextmanager
def lease(lock: epath.Path, owner: Mapping[str, Any]) -> Iterator[None]:
    """Holds an object of a bucket, where no lock ends with its process: one that is not rewritten all the time is nobody's.

    Args:
        owner: what the object says of its holder.

    Raises:
        RunError: if it is somebody else's, or cannot be written. To find out what a killed process left takes `_SILENCE` seconds.
    """
    mine = json.dumps({**owner, "time": time.time()})
    with in_words(lock, "written"):
        found = now = _content(lock)
        if found is not None:
            logging.warning("%s is %s; waiting %.0f s to see whether that process lives", lock, found, _SILENCE)
            time.sleep(_SILENCE)
            now = _content(lock)
        if now in (found, None):
            lock.write_text(mine)
            time.sleep(_SETTLING)  # of several that do so now, it is the last one's
        holder = _content(lock)
    if holder != mine:
        raise RunError(f"another run is using {lock.parent}: {holder}; stop it, or use another --workdir")
    beats = itertools.count(1)

    def beat() -> None:
        try:
            lock.write_text(json.dumps({**owner, "beats": next(beats), "time": time.time()}))
        except Exception as error:  # of a network, which may be back at the next one
            logging.warning("%s could not be renewed: %r", lock, error)

    try:
        with repeating(beat, _BEAT, "lease"):
            yield
    finally:
        with in_words(lock, "written"):
            lock.unlink(missing_ok=True)


def is_leased(lock: epath.Path) -> bool:
    """Whether somebody holds a lease: it was renewed less than `_OUT_OF_DATE` seconds ago, by the clocks of both machines."""
    content = _content(lock)
    try:
        return content is not None and time.time() - json.loads(content)["time"] < _OUT_OF_DATE
    except (ValueError, TypeError, KeyError):  # something else wrote it
        return False


def _content(file: epath.Path) -> str | None:
    try:
        return read_whole(file).decode()
    except FileNotFoundError:
        return None


class Spool:
    """A local directory, `path`, for files that belong in `folder`: that itself or, of a bucket, a temporary one.

    From there `publish`, and the end of the context, copy what is new or has grown.
    """

    def __init__(self, folder: os.PathLike):
        self._folder = epath.Path(folder)
        self.path = pathlib.Path(tempfile.mkdtemp() if in_bucket(folder) else folder)
        self._published: dict[pathlib.Path, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if in_bucket(self._folder):
            self.publish()
            shutil.rmtree(self.path)

    def publish(self) -> None:
        """Raises RunError if the bucket does not take it."""
        if in_bucket(self._folder):
            for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
                stat = file.stat()
                now = (stat.st_size, stat.st_mtime_ns)
                if self._published.get(file) != now:
                    with in_words(self._folder, "written"):
                        (self._folder / file.relative_to(self.path)).write_bytes(file.read_bytes())
                    self._published[file] = now
