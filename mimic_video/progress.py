"""How far a long loop has come: a bar on a terminal, and in a log file a line every few seconds."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Self

from tqdm import tqdm

_SECONDS = 10.0  # between lines
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(
    iterable: Iterable[Any] = (),
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str = "",
    unit: str = "step",
    hide: bool = False,
) -> "tqdm[Any] | Lines":
    """What is iterated over, or a context whose `update` is called after every step; it says on stderr how far that is.

    Args:
        total: steps in all; by default the length of the iterable.
        initial: steps that are done already.
        desc, unit: what is done, and one of them.
        hide: says nothing, as processes but the first do.
    """
    total = len(iterable) if total is None and isinstance(iterable, Sized) else total
    unit = f" {unit}"
    if sys.stderr.isatty():
        return tqdm(iterable, total=total, initial=initial, desc=desc, unit=unit, mininterval=1.0, disable=hide)
    return Lines(iterable, total, initial, desc, unit, hide)


class Lines:
    """The part of tqdm's interface that is used here, without carriage returns."""

    def __init__(self, iterable: Iterable[Any], total: int | None, initial: int, desc: str, unit: str, hide: bool):
        self.n = initial
        self._iterable, self._total, self._initial, self._hide = iterable, total, initial, hide
        self._words = {"prefix": desc, "unit": unit, "postfix": ""}
        self._start = self._said = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for value in self._iterable:
                yield value
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.n > self._initial:
            self._say()

    def update(self, count: int = 1) -> None:
        self.n += count
        if time.monotonic() - self._said >= _SECONDS and self.n != self._total:
            self._say()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What the next line ends with; `refresh` is of the bar."""
        self._words["postfix"] = text

    def _say(self) -> None:
        self._said = time.monotonic()
        if self._hide:
            return
        numbers = {"n": self.n, "total": self._total, "elapsed": self._said - self._start, "initial": self._initial}
        line = tqdm.format_meter(**numbers, **self._words, bar_format=_LINE if self._total else None)
        # A log on a full disk, or a reader that is gone, neither ends what is done nor takes the place of the error that did.
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
