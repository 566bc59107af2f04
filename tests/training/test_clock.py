import pytest
import tiny

from mimic_video.config import ConfigError
from mimic_video.training import clock as clock_module
from mimic_video.training.clock import ProfilerWindow, StepClock, first_start
from mimic_video.training.flops import step_flops
from mimic_video.training.metrics import MetricWriter

CONFIG = tiny.experiment()  # batches of 8 windows of 6 tokens


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = Time()
    monkeypatch.setattr(clock_module, "time", fake)
    return fake


def start(run, time, step, seconds):
    """A start that takes `seconds` up to the end of its first step, after `step`."""
    started = first_start(run)
    time.now += seconds
    with MetricWriter(run, step, CONFIG) as writer:
        clock = StepClock(tiny.model(CONFIG), run, started)
    clock.step()
    clock.restart()
    return writer, clock


def run_steps(time, clock, count, seconds):
    for _ in range(count):
        with clock.waiting():
            time.now += seconds / 4
        time.now += seconds * 3 / 4
        clock.step()


def test_rates_are_of_the_steps_since_the_restart(tmp_path, time):
    _, clock = start(tmp_path, time, 0, 30)
    run_steps(time, clock, 5, 2.0)
    values = clock.lap()
    assert values["samples_per_second"] == pytest.approx(4.0) and values["tokens_per_second"] == pytest.approx(24.0)
    assert values["model_flops_per_second"] == pytest.approx(step_flops(tiny.model(CONFIG)).model / 2)
    assert values["data_wait_fraction"] == pytest.approx(0.25)
    assert "mfu" not in values  # nobody knows a CPU's peak
    clock.restart()
    run_steps(time, clock, 1, 1.0)
    with clock.stopped():
        time.now += 100
    assert clock.lap()["samples_per_second"] == pytest.approx(8.0)


def test_there_are_no_rates_without_steps(tmp_path, time):
    _, clock = start(tmp_path, time, 0, 30)
    assert clock.lap() == {"step_seconds": 0.0, "goodput": 0.0}


def test_goodput_is_of_all_restarts(tmp_path, time):
    _, clock = start(tmp_path, time, 0, 10)  # and step 1
    run_steps(time, clock, 4, 2.0)
    values = clock.lap()
    assert values["step_seconds"] == pytest.approx(8) and values["goodput"] == pytest.approx(8 / 18)
    with MetricWriter(tmp_path, 0, CONFIG) as writer:
        writer.write(5, values)
        time.now += 2  # the checkpoint
        clock.restart()
        run_steps(time, clock, 5, 2.0)
        values = clock.lap()
        assert values["goodput"] == pytest.approx(18 / 30)
        writer.write(10, values)
    time.now += 60  # a crash before the checkpoint of step 10; nobody is there
    _, clock = start(tmp_path, time, 5, 10)
    run_steps(time, clock, 10, 2.0)
    values = clock.lap()
    assert values["step_seconds"] == pytest.approx(8 + 20)
    assert values["goodput"] == pytest.approx(28 / (18 + 2 + 10 + 60 + 10 + 20))


def test_the_first_start_is_kept(tmp_path, time):
    assert first_start(tmp_path) == 1000.0
    time.now += 5
    assert first_start(tmp_path) == 1000.0


@pytest.mark.parametrize("window", [(0, 2), (3, 2), (3, 5)])
def test_steps_to_profile_that_there_are_not(tmp_path, window):
    with pytest.raises(ConfigError, match=r"steps to profile are \d:\d; expected FIRST:LAST within 1:4"):
        ProfilerWindow(tmp_path, window, 4)


def test_a_damaged_first_start_is_replaced(tmp_path, time, caplog):
    for damage in ("", "\0" * 18):
        (tmp_path / "first_start").write_text(damage)
        assert first_start(tmp_path) == first_start(tmp_path) == time.time()
        assert "first_start is damaged" in caplog.text
        time.now += 1
