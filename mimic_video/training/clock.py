"""What a run's wall time goes into, and profiles of chosen steps."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from mimic_video.config import ConfigError
from mimic_video.parallel.chips import mfu
from mimic_video.runs.directory import read_metrics, write_json
from mimic_video.runs.storage import Spool
from mimic_video.training.flops import step_flops, video_tokens
from mimic_video.vam import VideoActionModel

# Metrics that a repeated run does not repeat: everything else is a function of the configuration and the data.
MEASURED = (
    "step_seconds",
    "goodput",
    "samples_per_second",
    "tokens_per_second",
    "model_flops_per_second",
    "data_wait_fraction",
    "mfu",
    "hbm_gb",
    "hbm_gb_peak",
)


def first_start(run: epath.Path) -> float:
    """When the run was started for the first time, in seconds since 1970; now, if it has not been.

    The file `first_start`, which the first process writes, keeps it, so that all restarts are counted from there.
    """
    path, now = run / "first_start", time.time()
    if path.exists():
        try:
            return float(path.read_text())
        except ValueError as error:
            logging.warning("%s is damaged (%s): the run's goodput counts from now", path, error)
    if jax.process_index() == 0:
        write_json(path, now)
    return now


class StepClock:
    """Measures steps between one `restart` and the next `lap`, and the goodput of the run.

    Goodput is the share of the wall time since `first_start`, over all restarts, that went into steps that count. What lowers it:
    steps that are repeated because no checkpoint holds them, starting (with the first step of a start, in which it compiles),
    validation, waits for checkpoints, and the time in which nothing runs. Waits for data are part of steps;
    `data_wait_fraction` has them.

    Args:
        started: what `first_start` said.
        run: its metrics up to the step that it continues from say what the steps before took.
    """

    def __init__(self, vam: VideoActionModel, run: epath.Path, started: float):
        records = read_metrics(run)
        self._started, self._counted = started, records[-1].get("step_seconds", 0.0) if records else 0.0
        batch = vam.config.train.batch_size
        self._samples, self._tokens = batch, batch * video_tokens(vam)
        self._flops, self._devices = step_flops(vam).model, jax.devices()
        self.restart()

    def restart(self) -> None:
        """From here on it is steps again."""
        self._mark, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waits for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Around what takes time but is no part of a step."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def step(self) -> None:
        self._steps += 1

    def lap(self) -> dict[str, float]:
        """Metrics of the steps since the restart, whose results have arrived; tokens are the video's, the model's FLOPs those of
        `step_flops`, and `mfu` is absent where the chip's peak is not known."""
        seconds = time.perf_counter() - self._mark
        self._counted += seconds if self._steps else 0.0
        values = {"step_seconds": self._counted, "goodput": self._counted / (time.time() - self._started)}
        if self._steps:
            rate = self._steps / seconds
            values |= {
                "samples_per_second": rate * self._samples,
                "tokens_per_second": rate * self._tokens,
                "model_flops_per_second": rate * self._flops,
                "data_wait_fraction": self._waited / seconds,
            }
            if (utilisation := mfu(rate * self._flops, self._devices)) is not None:
                values["mfu"] = utilisation
        return values


class ProfilerWindow:
    """A trace of the steps `first` to `last`, or what is left of them, in the run's folder `profile`; the first process makes it.

    Args:
        window: those two; None for none.

    Raises:
        ConfigError: unless 1 ≤ first ≤ last ≤ the number of steps.
    """

    def __init__(self, run: epath.Path, window: tuple[int, int] | None, steps: int):
        if window is not None and not 1 <= window[0] <= window[1] <= steps:
            raise ConfigError(f"steps to profile are {window[0]}:{window[1]}; expected FIRST:LAST within 1:{steps}")
        self._folder, self._window = run / "profile", window if jax.process_index() == 0 else None
        self._spool: Spool | None = None

    def before(self, step: int) -> None:
        if self._window is not None and self._spool is None and self._window[0] <= step <= self._window[1]:
            self._spool = Spool(self._folder)
            jax.profiler.start_trace(str(self._spool.path))

    def after(self, step: int, result: Any) -> None:
        """Ends the trace after its last step, whose `result` it waits for."""
        if self._spool is not None and self._window is not None and step == self._window[1]:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._spool.close()
            self._spool = None
