"""What long loops say: a bar for people, lines for files."""

import errno
import io
import os
import re

import pytest

from mimic_video import progress as module
from mimic_video.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def seconds(monkeypatch):
    """The clock, which tests set."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end(seconds, capsys):
    for step in progress(range(50), desc="train", unit="episode"):
        seconds[0] += 1.0
        assert step < 50
    lines = capsys.readouterr().err.splitlines()
    assert [re.match(r"train: (\d+)/50 \[", line)[1] for line in lines] == ["10", "20", "30", "40", "50"]
    assert lines[0] == "train: 10/50 [00:10<00:40,  1.00 episode/s]"


def test_what_is_done_before_does_not_count_in_the_rate(seconds, capsys):
    with progress(total=100, initial=90, desc="video stage") as bar:
        bar.set_postfix_str("loss 3")
        for _ in range(10):
            seconds[0] += 0.5
            bar.update()
        assert bar.n == 100
    assert capsys.readouterr().err == "video stage: 100/100 [00:05<00:00,  2.00 step/s, loss 3]\n"


def test_nothing_done_and_what_is_hidden_say_nothing(seconds, capsys):
    with progress(total=3):
        pass
    assert list(progress(range(3), hide=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_an_error_shows_how_far_it_came(seconds, capsys):
    with pytest.raises(ValueError, match="broken"), progress(total=7, desc="shard") as bar:
        bar.update(2)
        raise ValueError("broken")
    assert capsys.readouterr().err.startswith("shard: 2/7 [")


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EPIPE])
def test_a_line_that_cannot_be_written_hides_no_error(number, seconds, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sys.stderr", Full())
    with pytest.raises(ValueError, match="broken"), progress(total=7, desc="shard") as bar:
        seconds[0] += 20.0
        bar.update(2)
        raise ValueError("broken")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    assert list(progress(iter("abc"), total=3, desc="train", unit="episode")) == ["a", "b", "c"]
    import sys

    assert "100%|" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()
