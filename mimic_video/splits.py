"""Splits of a dataset, and slices of one by its episodes, in the words of TFDS."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

_NAME = r"[\w-]+"
_EPISODES = r"-?\d+(?:_\d+)*"
_PERCENT = r"-?\d+(?:\.\d*)?%"
_BOUNDS = rf"(?:{_EPISODES})?:(?:{_EPISODES})?|(?:{_PERCENT})?:(?:{_PERCENT})?"
_PART = re.compile(rf"({_NAME})(?:\[(?!:\])({_BOUNDS})\])?")  # [:] is none in TFDS either
_EXPECTED = (
    "the name of a split such as 'train', or slices of one by episodes: 'train[:50]', 'train[-20:]', 'train[10%:20%]', "
    "'train[:5]+train[20:25]'"
)


class Slice(NamedTuple):
    """Episodes `start` to `stop` − 1, counted from the end if negative; None for the first or the last one.

    Both are numbers of episodes, or percentages from -100 to 100 if `percent`.
    """

    text: str
    start: float | None = None
    stop: float | None = None
    percent: bool = False

    def numbers(self, count: int) -> range:
        """Of `count` episodes in stored order, those of the slice.

        Percentages are rounded to the nearest episode, halves to the even one.

        Raises:
            ValueError: saying what was expected, if a bound is beyond them, or no episode is left.
        """
        start, stop = (
            edge if bound is None else self._bound(bound, count) for bound, edge in ((self.start, 0), (self.stop, count))
        )
        if start >= stop:
            raise ValueError(f"'{self.text}' has none of {count} episodes; expected a slice with one or more")
        return range(start, stop)

    def _bound(self, bound: float, count: int) -> int:
        number = round(bound * count / 100) if self.percent else int(bound)
        if abs(number) > count:
            raise ValueError(f"'{self.text}' is beyond its {count} episodes; expected bounds from {-count} to {count}")
        if bound < 0 == number:  # TFDS would count it from the beginning
            raise ValueError(
                f"'{self.text}' begins or ends {-bound:g}% of {count} episodes before the end, which is none of them"
            )
        return number + count if number < 0 else number


class Split(NamedTuple):
    """A split, by `name`, and the slices of it that are read, one after the other."""

    name: str
    slices: tuple[Slice, ...]

    @property
    def whole(self) -> bool:
        return self.slices == (Slice(self.name),)

    def numbers(self, count: int) -> Sequence[int]:
        """Of the `count` episodes of the split, those that are read. Raises ValueError as `Slice.numbers`."""
        parts = [part.numbers(count) for part in self.slices]
        return parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts))


def parse_split(text: str) -> Split:
    """The split that a text means as TFDS understands it, but for shards and sums of several splits.

    Raises:
        ValueError: whose message is what was expected.
    """
    parts = [_PART.fullmatch(part) for part in re.split(r"\s*\+\s*", text)]
    if not all(parts):
        raise ValueError(_EXPECTED)
    names = {part[1] for part in parts if part}
    if len(names) > 1:
        raise ValueError(f"slices of one split, not of {' and '.join(sorted(names))}")
    return Split(names.pop(), tuple(_slice(part[0], part[2]) for part in parts if part))


def _slice(text: str, bounds: str | None) -> Slice:
    if bounds is None:
        return Slice(text)
    percent = "%" in bounds
    start, stop = (float(bound.rstrip("%")) if bound else None for bound in bounds.split(":"))
    if percent and max(abs(start or 0), abs(stop or 0)) > 100:
        raise ValueError("percentages from -100 to 100")
    return Slice(text, start, stop, percent)
