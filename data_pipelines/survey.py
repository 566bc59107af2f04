"""What is known of a source's episodes without their values: which can be read, when their steps are, what they are told.

To know it, every episode is read once. Of a source that can keep it, that is the first time that a split, or a slice of it, is
opened; after that nothing grows with the number of episodes but a few integers.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from data_pipelines.episode import ContentHash, EpisodeSource, content_hash
from data_pipelines.sources.index import first_writable, lock
from data_pipelines.sources.records import DatasetError
from mimic_video.atomic import atomically
from mimic_video.progress import progress

_CHECKED = 16  # episodes that are compared with what is kept
_LONG = 10_000  # episodes that take so long to read that one wants to see how far it is

_log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """What only reading all episodes of a source tells.

    Attributes:
        broken: places in the source of episodes that cannot be read.
        instructions: every instruction of the others once, in their order.
        content: `content_hash` of the others.
    """

    broken: list[int]
    instructions: list[str]
    content: str


class Survey(NamedTuple):
    """What is known of a source's episodes.

    Attributes:
        broken, instructions, content: see `Reading`.
        clocks: every different array of time stamps, float64 seconds.
        clock_of: int32 (episodes,), which of them are those of each episode that can be read.
    """

    broken: list[int]
    instructions: list[str]
    content: str
    clocks: list[np.ndarray]
    clock_of: np.ndarray


@runtime_checkable
class SurveyedSource(Protocol):
    """An `EpisodeSource` that has its survey, or part of it, from another time."""

    def survey(self) -> Survey: ...


def survey_of(source: EpisodeSource) -> Survey:
    """That of any source. Raises nothing for episodes that cannot be read."""
    return source.survey() if isinstance(source, SurveyedSource) else read_through(source)


def readable(count: int, broken: Sequence[int]) -> Sequence[int] | np.ndarray:
    """Of `count` places those that are not broken."""
    return np.delete(np.arange(count), broken) if broken else range(count)


def read_through(source: EpisodeSource) -> Survey:
    """Reads every episode."""
    broken: list[int] = []
    instructions: dict[str, None] = {}
    digest = ContentHash()
    clocks: dict[bytes, int] = {}
    clock_of = []
    for place in progress(range(len(source)), desc=f"reading {source.name} once", unit="episode", hide=len(source) < _LONG):
        try:
            episode = source[place]
        except DatasetError:
            broken.append(place)
        else:
            instructions.update(dict.fromkeys(episode.instructions))
            digest.update(episode)
            clock_of.append(clocks.setdefault(episode.timestamps.tobytes(), len(clocks)))
    stamps = [np.frombuffer(clock) for clock in clocks]
    return Survey(broken, list(instructions), digest.hexdigest(), stamps, np.array(clock_of, np.int32))


def kept_reading(source: EpisodeSource, folders: Sequence[Path], name: str) -> Reading:
    """`read_through`, from the file `name` if one of `folders` has it; otherwise it is written to the first that can be.

    The file says what some episodes held, evenly spread, which are compared, and every episode that is broken is tried again. So
    an entry of the registry that computes its values in another way now is found out, and all episodes are read anew.
    """
    for folder in folders:
        if (found := _load(folder / name, source)) is not None:
            return found
    root = first_writable(folders)
    if folders and root is None:
        _log.warning("what is known of %s is not kept: none of %s can be written", source.name, ", ".join(map(str, folders)))
    with contextlib.nullcontext() if root is None else lock(root / f"{name}.lock"):
        if root is not None and (found := _load(root / name, source)) is not None:  # another process had the lock before
            return found
        _log.info("reading the %d episodes of %s once, to know which can be read and what they hold", len(source), source.name)
        survey = read_through(source)
        reading = Reading(survey.broken, survey.instructions, survey.content)
        if root is not None:
            checks = {place: content_hash([source[place]]) for place in _spread(len(source), reading.broken)}
            with atomically(root / name) as partial:
                partial.write_text(json.dumps({**reading._asdict(), "checks": checks}))
    return reading


def _load(path: Path, source: EpisodeSource) -> Reading | None:
    try:
        found = json.loads(path.read_text())
        reading, checks = Reading(**{name: found[name] for name in Reading._fields}), found["checks"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be read, so the episodes of %s are read again: %s", path, source.name, error)
        return None
    expected = {int(place): content for place, content in checks.items()} | dict.fromkeys(reading.broken)
    for place, content in expected.items():
        if _content(source, place) != content:
            _log.info("episode %d of %s is not what it was", source.numbers[place], source.name)
            return None
    return reading


def _content(source: EpisodeSource, place: int) -> str | None:
    """None of an episode that cannot be read."""
    try:
        return content_hash([source[place]])
    except DatasetError:
        return None


def _spread(count: int, broken: Sequence[int]) -> Iterator[int]:
    places = readable(count, broken)
    chosen = np.unique(np.linspace(0, len(places) - 1, min(_CHECKED, len(places))).round().astype(int))
    return (int(places[i]) for i in chosen)
