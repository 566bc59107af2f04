import dataclasses

import numpy as np
import pytest
from synthetic import step_episode

from data_pipelines.importing import Import
from data_pipelines.rates import check_times
from data_pipelines.sources.rlds import DatasetError

HZ = 10.0


class Recording(list):
    """A source of episodes."""

    control_hz, image_size, camera_sizes, skipped = HZ, (8, 8), {"primary": (8, 8)}, {}


def episode(times):
    return dataclasses.replace(step_episode(len(times)), timestamps=np.asarray(times, float))


REGULAR = np.arange(12) / HZ


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (REGULAR * 1e3, r"time stamps are 100 apart; expected 0\.1, in seconds"),
        (REGULAR * 1e9, r"time stamps are 1e\+08 apart; expected 0\.1, in seconds"),
        (np.arange(12), r"time stamps are 1 apart; expected 0\.1"),  # numbers of steps
        (REGULAR / 2, r"time stamps are 0\.05 apart; expected 0\.1"),  # of another rate
        (REGULAR + 3600 * (REGULAR > 0.55), r"go 3600 s ahead after step 5; expected about 0\.1: a clock was set"),
    ],
    ids=["milliseconds", "nanoseconds", "numbers", "another rate", "a clock that was set"],
)
def test_time_stamps_that_are_no_seconds_at_the_sources_rate(times, message):
    """Resampled, they would make thousands of steps of a few, or a few of thousands."""
    with pytest.raises(DatasetError, match=rf"^episode \d+: .*{message}"):
        check_times(episode(times), HZ)
    source = Import(Recording([episode(REGULAR), episode(times)]), 5.0, (), skip_damaged=True)
    assert [len(each) for each in source.episodes("train", [0, 1])] == [6]
    assert [len(names) for names in source.skipped.values()] == [1]


@pytest.mark.parametrize("times", [[0.0], REGULAR, 1.3 * REGULAR, np.delete(REGULAR, 3), 1.7e9 + REGULAR])
def test_time_stamps_of_real_recordings(times):
    """One step, a rate that is nearly that, a step that was lost, Unix seconds."""
    check_times(episode(times), HZ)
