"""What a terminal, or a log, shows of a sweep while it runs."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from mimic_video.evaluation.sweep_report import table
from mimic_video.evaluation.sweep_results import Result
from mimic_video.runs.storage import repeating

_SECONDS = 1.0  # between two looks


@contextlib.contextmanager
def shown(look: Callable[[], Sequence[Result]], metric: str | None) -> Iterator[None]:
    """Until the block ends, shows the table of results on a terminal, and elsewhere a line for every change of a state."""
    with _on_terminal(look, metric) if sys.stdout.isatty() else _in_log(look):
        yield


@contextlib.contextmanager
def _on_terminal(look: Callable[[], Sequence[Result]], metric: str | None) -> Iterator[None]:
    from rich.live import Live  # only here, where something is drawn

    with (
        Live(table(look(), metric), auto_refresh=False) as live,
        _repeating(lambda: live.update(table(look(), metric), refresh=True)),
    ):
        yield


@contextlib.contextmanager
def _in_log(look: Callable[[], Sequence[Result]]) -> Iterator[None]:
    before: dict[str, tuple[str, str]] = {result.entry.name: _states(result) for result in look()}

    def changes() -> None:
        for result in look():
            states = _states(result)
            if before.get(result.entry.name) != states:
                before[result.entry.name] = states
                print(f"{time.strftime('%T')} {result.entry.name}: {_words(result)}", flush=True)

    with _repeating(changes):
        yield


def _states(result: Result) -> tuple[str, str]:
    return result.training.state, result.evaluation.state


def _words(result: Result) -> str:
    """Where a point stands, such as "training failed at step 20 of 100: loss is nan"."""
    what, status = ("training", result.training) if result.evaluation.state == "waiting" else ("evaluation", result.evaluation)
    steps = f" at step {status.step} of {status.steps}" if status.steps else ""
    return f"{what} {status.state}{steps}" + (f": {status.reason}" if status.reason else "")


@contextlib.contextmanager
def _repeating(action: Callable[[], None]) -> Iterator[None]:
    """Calls a function every so often until the block ends, and once more then."""
    try:
        with repeating(action, _SECONDS, "screen"):
            yield
    finally:
        action()
