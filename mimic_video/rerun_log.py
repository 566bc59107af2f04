"""What a robot sees, is told and does, as a recording of Rerun (rerun.io): a file that its viewer opens, or a viewer at once.

The package rerun-sdk is imported when a log is made, and not before. Entities are named "PLACE/camera/primary", "PLACE/actions"
and so on. Their timeline is `time`, in seconds from the beginning of PLACE.
"""

import contextlib
import pathlib
import socket
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from mimic_video.errors import ConfigError

CONNECT = "connect"
HELP = "FILE.rrd to write a recording of Rerun to, or connect: to a viewer that runs on this machine, connect:HOST:PORT elsewhere"
TIMELINE = "time"
_VIEWER = "127.0.0.1:9876"  # where `rerun` listens
_SECONDS = 2.0  # that a viewer has to answer
_QUALITY = 90  # of JPEG


class RerunLog:
    """A recording that is being made; thread-safe. A context manager, since only `close` completes the file.

    Args:
        target: `FILE.rrd`, which is replaced; `connect` for a viewer on this machine, or `connect:HOST:PORT`.
        application: what is recorded, as viewers show it.

    Raises:
        ConfigError: without rerun-sdk, for another target, for a file that cannot be written, or if no viewer is there.
    """

    def __init__(self, target: str, application: str):
        how, _, address = target.partition(":")
        if how != CONNECT and not target.endswith(".rrd"):
            raise ConfigError(f"--rerun is {target!r}; expected FILE.rrd, {CONNECT} or {CONNECT}:HOST:PORT")
        try:
            import rerun
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--rerun={target} needs the package rerun-sdk; expected after pip install 'mimic-video-jax[rerun]'"
            ) from error
        if how == CONNECT:
            _require_viewer(target, address or _VIEWER)
        else:
            _require_writable(pathlib.Path(target))
        self._rerun, self._recording = rerun, rerun.RecordingStream(application)
        self._recording.set_log_tick_enabled(False)
        if how == CONNECT:
            self._recording.connect_grpc(f"rerun+http://{address or _VIEWER}/proxy")
        else:
            self._recording.save(target)
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is not written yet."""
        self._recording.flush()
        self._recording.disconnect()

    def images(self, place: str, frames: UInt8[np.ndarray, "f h w 3"], times: Shaped[np.ndarray, " f"]) -> None:
        """Frames as JPEGs."""
        for frame, time in zip(frames, times, strict=True):
            self._recording.set_time(TIMELINE, duration=float(time))
            self._recording.log(self._path(place), self._rerun.Image(frame).compress(_QUALITY))

    def values(
        self, place: str, values: Shaped[np.ndarray, "n d"], times: Shaped[np.ndarray, " n"], names: Sequence[str] = ()
    ) -> None:
        """Numbers over time, a line for each dimension; without `names` these are their numbers."""
        path = self._path(place)
        with self._lock:
            new = path not in self._named
            self._named.add(path)
        if new:
            names = names or [str(dim) for dim in range(values.shape[1])]
            self._recording.log(path, self._rerun.SeriesLines(names=list(names)), static=True)
        index = self._rerun.TimeColumn(TIMELINE, duration=np.asarray(times, np.float64))
        columns = self._rerun.Scalars.columns(scalars=np.asarray(values, np.float64))
        self._recording.send_columns(path, indexes=[index], columns=columns)

    def text(self, place: str, text: str, time: float) -> None:
        self._recording.set_time(TIMELINE, duration=float(time))
        self._recording.log(self._path(place), self._rerun.TextDocument(text))

    def chunk(self, place: str, number: int, actions: Float[np.ndarray, "a m"], start: float, hz: float, execute: int) -> None:
        """A planned chunk over the times that its actions are due at.

        Chunks overlap, so that they take turns in as many entities, PLACE/0 to PLACE/(n−1), as there are at one time.

        Args:
            number: counts the plans.
            start: seconds that the first action is due at.
            hz: actions a second.
            execute: actions from one plan to the next.
        """
        turns = -(-len(actions) // execute)
        self.values(f"{place}/{number % turns}", actions, start + np.arange(len(actions)) / hz)

    def episode(
        self,
        place: str,
        times: Shaped[np.ndarray, " n"],
        cameras: Mapping[str, UInt8[np.ndarray, "n h w 3"]],
        proprio: Shaped[np.ndarray, "n p"] | None,
        actions: Shaped[np.ndarray, "k m"] | None,
        instructions: Sequence[str],
    ) -> None:
        """A whole episode. Its instruction, one for each step, is there where it changes; actions may be fewer than steps."""
        for camera, frames in cameras.items():
            self.images(f"{place}/camera/{camera}", frames, times)
        if proprio is not None:
            self.values(f"{place}/proprio", proprio, times)
        if actions is not None:
            self.values(f"{place}/actions", actions, times[: len(actions)])
        for step, instruction in enumerate(instructions):
            if step == 0 or instruction != instructions[step - 1]:
                self.text(f"{place}/instruction", instruction, times[step])

    def plan(
        self,
        place: str,
        number: int,
        time: float,
        images: Mapping[str, UInt8[np.ndarray, "h w 3"]],
        proprio: Shaped[np.ndarray, " p"],
        instruction: str,
        actions: Float[np.ndarray, "a m"],
        hz: float,
        execute: int,
        milliseconds: Mapping[str, float],
    ) -> None:
        """One answer of a policy: what it saw last, the chunk, and how long parts of the answer took."""
        now = np.array([time])
        for camera, image in images.items():
            self.images(f"{place}/camera/{camera}", image[None], now)
        self.values(f"{place}/proprio", proprio[None], now)
        self.text(f"{place}/instruction", instruction, time)
        self.chunk(f"{place}/plans", number, actions, time, hz, execute)
        self.values(f"{place}/latency_ms", np.array([list(milliseconds.values())]), now, list(milliseconds))

    def _path(self, place: str) -> str:
        return "/".join(map(self._rerun.escape_entity_path_part, place.split("/")))


@contextlib.contextmanager
def opened(target: str | None, application: str) -> Iterator[RerunLog | None]:
    """A log for a flag --rerun; None if it is not given."""
    with RerunLog(target, application) if target else contextlib.nullcontext() as log:
        yield log


def _require_writable(file: pathlib.Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("wb").close()
    except OSError as error:
        raise ConfigError(f"--rerun={file} cannot be written: {error}") from error


def _require_viewer(target: str, address: str) -> None:
    """A client of Rerun waits for a viewer without a word."""
    url: Any = urllib.parse.urlsplit(f"//{address}")
    try:
        if not url.hostname or not url.port:
            raise ValueError("it has no port")
        socket.create_connection((url.hostname, url.port), timeout=_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--rerun={target}: no viewer of Rerun listens at {address} ({error}); start one with: rerun"
        ) from error
