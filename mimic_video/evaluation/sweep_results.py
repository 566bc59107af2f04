"""What became of a sweep: its points as `sweep.json` in its folder lists them, and what their runs say.

Points are compared by a metric:

* "success": the share of evaluated episodes that succeed;
* "validation": the lowest validation error of training, `validation_video_mse` or `validation_action_mse`;
* the name of any other number: of a metric in metrics.jsonl, whose newest value counts, or in evaluation.json by its path, such
  as "open_loop.rmse" or "success.drawer-open-v3.rate". A list of numbers there counts by its mean: "psnr" is that of all frames.

Of success, PSNR, goodput, utilisation and what is counted per second, more is better; of everything else, less.

Runs may be waiting, running or dead meanwhile. A file that is damaged or cannot be read is left out, with a warning.
"""

import collections
import concurrent.futures
import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from absl import logging
from etils import epath

from mimic_video.errors import nearest
from mimic_video.evaluation.rollouts import wilson_interval
from mimic_video.runs.directory import read_metrics, write_json
from mimic_video.runs.status import Activity, Status, read_status
from mimic_video.runs.storage import RunError, in_bucket, read_whole

Curve = tuple[tuple[int, float], ...]  # steps and values

_T = TypeVar("_T")
_HIGHER = re.compile(r"^(success|psnr|goodput|mfu)|_per_second$")  # names of metrics of which more is better
_READERS = 16  # threads that read runs: a bucket answers after a while, but many at once


@dataclasses.dataclass(frozen=True)
class Entry:
    """A point of a sweep.

    Attributes:
        name: what it is called, such as "learning_rate=0.0001,seed=1".
        values: of the configuration's fields that the sweep sets, by their paths.
        run, out: folders of its run and its evaluation, below that of the sweep; "" is that itself.
    """

    name: str
    values: Mapping[str, Any]
    run: str
    out: str


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What is kept of a run's metrics.jsonl.

    Attributes:
        step: of the newest record; 0 without any.
        newest: value of every metric.
        training, validation: the error that is trained on, and the same on held-out windows.
    """

    step: int = 0
    newest: Mapping[str, float] = dataclasses.field(default_factory=dict)
    training: Curve = ()
    validation: Curve = ()


@dataclasses.dataclass(frozen=True)
class Success:
    """Successes of at least one episode."""

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate, Wilson's. It covers the choice of episodes, not that of training seeds."""
        return wilson_interval(self.successes, self.episodes)


@dataclasses.dataclass(frozen=True)
class Result:
    """How far a point of a sweep has come.

    Attributes:
        metrics: of its training.
        evaluated: numbers of its evaluation.json, by their paths.
    """

    entry: Entry
    training: Status
    evaluation: Status
    metrics: Metrics = Metrics()
    evaluated: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """Of training: the newest that there are metrics of or, without any, that its status names."""
        return self.metrics.step or self.training.step

    @property
    def last(self) -> float | None:
        """The newest validation error."""
        return self.metrics.validation[-1][1] if self.metrics.validation else None

    @property
    def best(self) -> float | None:
        """The lowest validation error."""
        return min((value for _, value in self.metrics.validation if math.isfinite(value)), default=None)

    @property
    def success(self) -> Success | None:
        successes, episodes = (self.evaluated.get(f"success.overall.{name}", 0) for name in ("successes", "episodes"))
        return Success(int(successes), int(episodes)) if episodes >= 1 and 0 <= successes <= episodes else None

    @property
    def hours(self) -> float:
        """That training has taken, in all its starts."""
        return self.training.seconds / 3600

    @property
    def state(self) -> str:
        """Of both in a word or two: evaluation counts once training is finished."""
        if self.training.state != "finished" or self.evaluation.state == "waiting":
            return {"finished": "trained"}.get(self.training.state, self.training.state)
        return {"finished": "evaluated", "running": "evaluating"}.get(
            self.evaluation.state, f"evaluation {self.evaluation.state}"
        )

    @property
    def reason(self) -> str:
        """Why training or evaluation did not get on."""
        return self.training.reason or self.evaluation.reason


def save_entries(workdir: epath.Path, entries: Sequence[Entry]) -> None:
    """Writes sweep.json; points that are in it already, of this sweep or another one in the same folder, stay."""
    known = {entry.name: entry for entry in load_entries(workdir)} if (workdir / "sweep.json").exists() else {}
    known |= {entry.name: entry for entry in entries}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "sweep.json", [dataclasses.asdict(entry) for entry in known.values()])


def load_entries(workdir: epath.Path) -> list[Entry]:
    """The points of sweep.json. Raises RunError if there is none."""
    path = workdir / "sweep.json"
    try:
        return [Entry(**values) for values in json.loads(read_whole(path))]
    except FileNotFoundError as error:
        raise RunError(f"{workdir} has no sweep.json: no sweep was started there") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def results(workdir: epath.Path, entries: Sequence[Entry]) -> list[Result]:
    """Where each point stands. It may be asked for all the time: metrics and evaluations are read only if they have changed."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda entry: result(workdir, entry), entries))


def result(workdir: epath.Path, entry: Entry) -> Result:
    """Where a point stands."""
    run, out = workdir / entry.run, workdir / entry.out
    return Result(
        entry,
        _status(run, "training"),
        _status(out, "evaluation"),
        _if_changed(run / "metrics.jsonl", _metrics, Metrics()),
        _if_changed(out / "evaluation.json", _evaluated, {}),
    )


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """The last names of fields where these tell them apart."""
    last = collections.Counter(field.rpartition(".")[2] for field in fields)
    return {field: short if last[short := field.rpartition(".")[2]] == 1 else field for field in fields}


# Metrics.


def number(result: Result, metric: str) -> float | None:
    """What a point has of a metric; None if that is nothing, or no finite number."""
    match metric:
        case "success":
            value = result.success.rate if result.success else None
        case "validation":
            value = result.best
        case _:
            value = result.evaluated.get(metric, result.metrics.newest.get(metric))
    return value if value is not None and math.isfinite(value) else None


def higher_is_better(metric: str) -> bool:
    return _HIGHER.search(metric) is not None


def chosen_metric(results: Iterable[Result], metric: str | None) -> str:
    """The metric that is asked for or, without one, "success" where any point has it, else "validation"."""
    return metric or ("success" if any(result.success for result in results) else "validation")


def require_metric(results: Sequence[Result], metric: str) -> None:
    """Warns if no point has a metric so far. Raises RunError if one is evaluated even so: then its name is a mistake."""
    if metric in ("success", "validation") or any(number(result, metric) is not None for result in results):
        return
    names = {name for result in results for name in (*result.metrics.newest, *result.evaluated)}
    message = f"no point of the sweep has the metric {metric!r}"
    if any(result.evaluated for result in results):
        raise RunError(f"{message}; did you mean {nearest(metric, ['success', 'validation', *sorted(names)])!r}?")
    logging.warning("%s so far", message)


def ranked(results: Iterable[Result], metric: str) -> list[Result]:
    """Best first; those that lack the metric are last, in the order of the sweep, as are those that are equally good."""
    sign = -1 if higher_is_better(metric) else 1
    values = [(number(result, metric), result) for result in results]
    order = sorted(values, key=lambda pair: math.inf if pair[0] is None else sign * pair[0])
    return [result for _, result in order]


# Reading.


def _status(folder: epath.Path, activity: Activity) -> Status:
    try:
        return read_status(folder, activity)
    except Exception as error:  # what is in a file may be anything, and what a bucket's client raises is of many kinds
        return Status("waiting", reason=f"status.json cannot be read: {error!r}")


_known: dict[str, tuple[Any, Any]] = {}  # file → its version, and what was read of it


def _if_changed(path: epath.Path, read: Callable[[epath.Path], _T], nothing: _T) -> _T:
    """What `read` makes of a file, now or earlier; `nothing` if there is none, or it cannot be read."""
    name = os.fspath(path)
    try:
        version = _version(path)
        if name not in _known or _known[name][0] != version:
            _known[name] = version, _or_nothing(path, read, nothing)
        return _known[name][1]
    except FileNotFoundError:
        return nothing
    except Exception as error:  # as above
        logging.warning("%s cannot be read and is left out: %r", path, error)
        return nothing


def _version(path: epath.Path) -> tuple[float, ...]:
    """Another one when a file has been written. (The path's own method looks up its owner's name, and there may be none.)"""
    if in_bucket(path):
        stat = path.stat()
        return stat.mtime, stat.length
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino


def _or_nothing(path: epath.Path, read: Callable[[epath.Path], _T], nothing: _T) -> _T:
    try:
        return read(path)
    except (ValueError, RecursionError) as error:
        logging.warning("%s is damaged and left out: %s", path, error)
        return nothing


def _metrics(path: epath.Path) -> Metrics:
    records = read_metrics(path.parent)
    newest: dict[str, float] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        newest |= {name: value for name, value in record.items() if is_number(value)}
    stage = "action" if newest.keys() & {"action_mse", "validation_action_mse"} else "video"
    for name in (f"{stage}_mse", f"validation_{stage}_mse"):
        curves[name] = [(int(record["step"]), record[name]) for record in records if is_number(record.get(name))]
    training, validation = (tuple(curve) for curve in curves.values())
    return Metrics(int(newest.get("step", 0)), newest, training, validation)


def _evaluated(path: epath.Path) -> dict[str, float]:
    values = json.loads(read_whole(path))
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return dict(_numbers({name: value for name, value in values.items() if name != "policy"}))  # that is settings


def _numbers(value: Any, path: str = "") -> Iterable[tuple[str, float]]:
    """The numbers in a JSON object, and the means of lists that have nothing else, by their paths."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{path}.{name}" if path else name)
    elif is_number(value):
        yield path, value
    elif isinstance(value, list) and value and all(map(is_number, value)):
        yield path, statistics.mean(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
