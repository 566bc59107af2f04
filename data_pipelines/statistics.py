"""Statistics of a dataset's low-dimensional windows, computed without reading an image."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from absl import logging

from data_pipelines.episode import Episode, content_hash
from data_pipelines.windows import action_windows, anchors
from mimic_video.atomic import atomically
from mimic_video.cache import user_cache
from mimic_video.config import DataConfig
from mimic_video.transforms import PERCENTILES, Statistics, compute_statistics, from_json, to_json

_VERSION = 2  # of what is computed
_MEMORY = 2**29  # bytes of actions that are held at once
_ROWS = {name: len(PERCENTILES) if name == "percentiles" else 1 for name in Statistics.__dataclass_fields__}


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes that compute statistics together, each of them one part; all have the same episodes.

    Attributes:
        index: of this process.
        count: of processes.
        gather: an array that has the same shape in every process → theirs in order, (count, *shape), in every process.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[np.ndarray], np.ndarray] = lambda values: values[None]


ONE_HOST = Hosts()


def cached_statistics(
    episodes: Iterable[Episode], config: DataConfig, hosts: Hosts = ONE_HOST, content: str | None = None
) -> dict[str, Statistics]:
    """`action_statistics`, kept in `~/.cache/mimic_video/statistics` by a hash of the episodes and of the fields that matter.

    So the same data under another path or in another file format has them already. A damaged file is replaced.

    Args:
        content: tells the episodes apart, where that is known: their `content_hash`, or another name of it.
    """
    depends = [_VERSION, content or content_hash(episodes), config.action_horizon, config.control_hz, config.action_delay]
    path = user_cache("statistics") / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]}.json"
    found = _read(path)
    if hosts.gather(np.array(found is not None)).all():  # or else all compute, as each of them has a part
        assert found is not None
        return found
    computed = action_statistics(episodes, config, hosts)
    if found is None:
        _write(path, computed)
    return computed


def action_statistics(episodes: Iterable[Episode], config: DataConfig, hosts: Hosts = ONE_HOST) -> dict[str, Statistics]:
    """Statistics over every action window of the episodes, repeated steps at their ends included (SPEC 7.1, 8.3).

    Exact, quantiles included: all windows, but only so many steps of their horizon at once as fit `_MEMORY`. Episodes that do not
    fit it are read once more for each such part. Each host has some of these steps; the result does not depend on how many
    hosts there are, not in one bit.

    A million steps with a horizon of 15 take one core 39 s for vectors of 20 numbers, 79 s for poses, without reading an image
    (`pytest -s -k million tests/data_pipelines/test_statistics.py`).

    Returns:
        "action": per-step statistics (A, m); "proprio": (1, p). Raw units.

    Raises:
        ValueError: if an episode has no actions or proprio, or no episode has an anchor.
    """
    count, width, episodes = 0, 0, _held(episodes)
    for episode in episodes:
        count += len(anchors(episode.timestamps, config, actions=True))
        width = width if episode.actions is None else episode.actions.shape[1]
    if not count:
        raise ValueError(f"no action windows: no episode reaches data.action_delay={config.action_delay} s")
    together = max(1, _MEMORY // (4 * width * count + 1))
    own = range(hosts.index, config.action_horizon, hosts.count)
    rows = np.zeros((sum(_ROWS.values()), config.action_horizon, width), np.float32)
    for first in range(0, max(len(own), 1), together):  # once at least, for the proprioception
        part = own[first : first + together]
        actions, proprio = np.empty((len(part), count, width), np.float32), []
        end = 0
        for episode in episodes:
            steps = anchors(episode.timestamps, config, actions=True)
            windows = action_windows(episode, steps, config, slice(part.start, part.stop, part.step))
            start, end = end, end + len(steps)
            actions[:, start:end] = windows["actions"].swapaxes(0, 1)
            proprio.append(windows["proprio"])
        for step, values in zip(part, actions, strict=True):
            rows[:, step] = _to_rows(compute_statistics(values[:, None]))[:, 0]
    steps = np.arange(config.action_horizon)
    rows = np.moveaxis(hosts.gather(rows)[steps % hosts.count, :, steps], 0, 1)
    return {"action": _from_rows(rows), "proprio": compute_statistics(np.concatenate(proprio))}


def _held(episodes: Iterable[Episode]) -> Iterable[Episode]:
    """Episodes in memory, if their values fit `_MEMORY`; otherwise as they were, to be read whenever they are iterated over."""
    held: list[Episode] = []
    size = 0
    for episode in episodes:
        held.append(episode)
        size += sum(values.nbytes for values in (episode.timestamps, episode.proprio, episode.actions) if values is not None)
        if size > _MEMORY:
            return episodes
    return held


def _to_rows(statistics: Statistics) -> np.ndarray:
    """Statistics of (H, d) as one array (rows, H, d)."""
    shape = statistics.mean.shape
    return np.concatenate([getattr(statistics, name).reshape(rows, *shape) for name, rows in _ROWS.items()])


def _from_rows(values: np.ndarray) -> Statistics:
    parts = np.split(values, np.cumsum(list(_ROWS.values()))[:-1])
    return Statistics(**{name: part if name == "percentiles" else part[0] for name, part in zip(_ROWS, parts, strict=True)})


def _read(path: Path) -> dict[str, Statistics] | None:
    try:
        found = from_json(json.loads(path.read_text()))
        return {key: found[key] for key in ("action", "proprio")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError) as error:
        logging.warning("%s cannot be read, so its statistics are computed again: %s", path, error)
        return None


def _write(path: Path, statistics: dict[str, Statistics]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as partial:
            partial.write_text(json.dumps(to_json(statistics)))
    except OSError as error:
        logging.warning("statistics are not kept: %s; XDG_CACHE_HOME can name another folder for them", error)
