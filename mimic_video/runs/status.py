"""`status.json` of a run directory: what its training, and its evaluation, say of themselves.

    {"training": {"state": "running", "step": 300, "steps": 1000, "host": "a", "starts": 2, ...}, "evaluation": {...}}

Process 0 writes it, on a file system or in a bucket, and nothing that it says changes what a run does: it is for those who watch
runs (launch/sweep.py, and people). A process that is killed cannot say so; its lock tells.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from absl import logging
from etils import epath

from mimic_video.parallel.distributed import failures_elsewhere, of_another_process
from mimic_video.runs.directory import is_locked, write_json
from mimic_video.runs.storage import read_whole

Activity = Literal["training", "evaluation"]
State = Literal["waiting", "running", "finished", "stopped", "failed", "killed"]

# Files of a run, as `directory.locked` has them.
LOCKS: dict[Activity, str] = {"training": "lock", "evaluation": "evaluation.lock"}
_SECONDS = 2.0  # between two records of progress at least: an object in a bucket may be written once a second
_REASON = 500  # characters


@dataclasses.dataclass(frozen=True)
class Status:
    """Where the training or the evaluation of a run stands.

    Attributes:
        state: "waiting" for what has not been started; "stopped" for what was asked to stop and is to be started again; "failed"
            for what ends in the same way if it is started again; "killed" for what ended without a word, or lost a process.
        step, steps: that are done and there are, of training.
        starts: how often it was started.
        seconds: that all starts together have taken, up to `updated`.
        host, pid: of process 0, in the last start.
        updated: when this was written, in UTC.
        reason: why it is stopped, failed or killed, in one line.
    """

    state: State
    step: int = 0
    steps: int = 0
    starts: int = 0
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    updated: str = ""
    reason: str = ""


def read_status(run: epath.Path, activity: Activity = "training") -> Status:
    """What a run says of itself; a state of "running" that no process stands for is "killed"."""
    status = _stored(run, activity)
    if status.state != "running" or is_locked(run, LOCKS[activity]):
        return status
    status = _stored(run, activity)  # it may just have ended
    if status.state != "running":
        return status
    return dataclasses.replace(
        status, state="killed", reason="it ended without a word: killed, out of memory, or its machine went"
    )


def _stored(run: epath.Path, activity: Activity) -> Status:
    values = _read(run).get(activity, {})
    known = {field.name for field in dataclasses.fields(Status)}  # a later version may say more
    return Status(**{"state": "waiting"} | {name: value for name, value in values.items() if name in known})


def _read(run: epath.Path) -> dict[str, Any]:
    try:
        values = json.loads(read_whole(epath.Path(run) / "status.json"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # zeros after a power cut
        logging.warning("%s/status.json is damaged and left out: %s", run, error)
        return {}
    return values if isinstance(values, dict) else {}


def record_end(run: epath.Path, activity: Activity, state: State, reason: str) -> None:
    """Says for a process that could not how it ended. To be called by whoever started it."""
    _write(run, activity, dataclasses.replace(_stored(run, activity), state=state, updated=_now(), reason=_line(reason)))


def _write(run: epath.Path, activity: Activity, status: Status, start: int | None = None) -> None:
    """Given the number of the start that says so, leaves what a later one has said."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        values = _read(run)
        if start is None or start >= values.get(activity, {}).get("starts", 0):
            write_json(run / "status.json", values | {activity: dataclasses.asdict(status)})
    except Exception as error:  # what a bucket's client raises is of many kinds
        logging.warning("%s/status.json cannot be written: %r", run, error)


def _now() -> str:
    return time.strftime("%FT%TZ", time.gmtime())


def _line(reason: str) -> str:
    return " ".join(reason.split())[:_REASON]


@contextlib.contextmanager
def reported(
    run: epath.Path, activity: Activity, steps: int = 0, stops: tuple[type[BaseException], ...] = ()
) -> Iterator[Callable[[int], None]]:
    """Keeps the status of a run until the block ends; gives `progress(step)`, which is cheap.

    To be entered with the lock of `LOCKS[activity]` held. Other processes than the first one write nothing. If the status cannot
    be written, there is a warning, and the run goes on.

    Args:
        steps: of the whole run.
        stops: exceptions by which a run that was asked to stop ends.
    """
    if jax.process_index() > 0:
        yield lambda step: None
        return
    before, start = _stored(run, activity), time.monotonic()
    ends: tuple[type[BaseException], ...] = (KeyboardInterrupt, *stops)
    now = dataclasses.replace(
        before, state="running", steps=steps, starts=before.starts + 1, host=socket.gethostname(), pid=os.getpid(), reason=""
    )
    written = float("-inf")

    def write(state: State, reason: str = "") -> None:
        nonlocal now, written
        written = time.monotonic()
        seconds = round(before.seconds + written - start, 1)
        now = dataclasses.replace(now, state=state, seconds=seconds, updated=_now(), reason=_line(reason))
        _write(run, activity, now, now.starts)

    def progress(step: int) -> None:
        nonlocal now
        now = dataclasses.replace(now, step=step)
        if time.monotonic() - written >= _SECONDS:
            write("running")

    def elsewhere(reason: str, silent: bool) -> None:
        write("killed" if silent else "failed", reason)

    write("running")
    with failures_elsewhere(elsewhere):
        try:
            yield progress
        except ends as stop:
            write("stopped", str(stop) or "interrupted")
            raise
        except BaseException as error:
            write("killed" if of_another_process(error) else "failed", _reason(error))
            raise
    if before.state == "finished" and now.step == before.step and now.steps == before.steps:  # there was nothing left to do
        _write(run, activity, before)
    else:
        write("finished")


def _reason(error: BaseException) -> str:
    """An error in words; that of a mistake, which our own errors are for, is its message alone."""
    own = type(error).__module__.split(".")[0] in ("mimic_video", "data_pipelines")
    return str(error) if own else f"{type(error).__name__}: {error}"
