"""Slices of a split: what they mean, beside TFDS, and what is refused."""

import itertools
import types

import pytest
import tensorflow_datasets as tfds

from mimic_video.config import ConfigError, DataConfig
from mimic_video.splits import Slice, parse_split


def of_tfds(text, count):
    """The numbers that TFDS makes of a text and a number of records; None if it refuses them."""
    split = types.SimpleNamespace(num_examples=count)
    try:
        parts = tfds.core.ReadInstruction.from_spec(text).to_absolute({"train": split})
    except ValueError:
        return None
    bounds = [(part.from_ or 0, count if part.to is None else part.to) for part in parts]
    return [number for start, stop in bounds for number in range(start, stop)]


def numbers(text, count):
    return list(parse_split(text).numbers(count))


def test_a_name_alone_is_the_whole_split():
    assert parse_split("train") == ("train", (Slice("train"),)) and parse_split("train").whole
    assert parse_split("my-split_2").name == "my-split_2"
    assert parse_split("train[:3]") == ("train", (Slice("train[:3]", None, 3.0),)) and not parse_split("train[:3]").whole
    assert parse_split("train").numbers(7) == range(7)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("train[:2]", 5, [0, 1]),
        ("train[2:]", 5, [2, 3, 4]),
        ("train[1:3]", 5, [1, 2]),
        ("train[-2:]", 5, [3, 4]),
        ("train[:-3]", 5, [0, 1]),
        ("train[-5:5]", 5, [0, 1, 2, 3, 4]),
        ("train[:40%]", 5, [0, 1]),
        ("train[:10%]", 5, []),
        ("train[:50%]", 5, [0, 1]),  # 2.5: to the even one
        ("train[:50%]", 7, [0, 1, 2, 3]),
        ("train[-20%:]", 5, [4]),
        ("train[33.3%:100%]", 3, [1, 2]),
        ("train[:1]+train[3:]", 5, [0, 3, 4]),
        ("train[3:] + train", 4, [3, 0, 1, 2, 3]),
        ("train[:1_0]", 12, list(range(10))),
    ],
)
def test_episodes_of_a_slice(text, count, expected):
    assert of_tfds(text, count) == expected
    if expected:
        assert numbers(text, count) == expected
    else:
        with pytest.raises(ValueError, match=r"'train\[:10%\]' has none of 5 episodes; expected a slice with one or more"):
            numbers(text, count)


def test_every_pair_of_bounds_is_what_it_is_in_tfds():
    whole = ["", *map(str, range(-8, 9))]
    percent = ["", *(f"{share}%" for share in (-100, -67, -50, -33.3, -12.5, -1, 0, 0.4, 1, 12.5, 20, 33, 50, 66.7, 99, 100))]
    accepted = refused = 0
    for bounds, count in itertools.product((whole, percent), (1, 2, 3, 7, 8, 40, 101)):
        for start, stop in itertools.product(bounds, bounds):
            text = f"train[{start}:{stop}]"
            theirs = of_tfds(text, count)
            try:
                assert numbers(text, count) == theirs, (text, count)
                accepted += 1
            except ValueError:
                shares = [float(bound[:-1]) for bound in (start, stop) if bound.endswith("%")]
                none = any(share < 0 and round(share * count / 100) == 0 for share in shares)
                assert not theirs or none, (text, count)  # as the next test has it
                refused += 1
    assert accepted > 1000 and refused > 1000


@pytest.mark.parametrize("text", ["train[-1%:]", "train[:-1%]"])
def test_a_share_from_the_end_that_is_no_episode_is_refused(text):
    """TFDS counts it from the beginning: all episodes, or none."""
    with pytest.raises(ValueError, match=r"begins or ends 1% of 10 episodes before the end, which is none of them"):
        numbers(text, 10)
    assert numbers(text, 100) == of_tfds(text, 100)


@pytest.mark.parametrize(
    ("text", "bound"), [("train[:6]", 5), ("train[-6:]", 5), ("train[6:9]", 5), ("train[:2]+train[:6]", 5), ("train[:-6]", 5)]
)
def test_bounds_beyond_the_split(text, bound):
    assert of_tfds(text, bound) is None
    with pytest.raises(ValueError, match=r"'train\[[-6:9]+\]' is beyond its 5 episodes; expected bounds from -5 to 5"):
        numbers(text, bound)


MALFORMED = ["", "train[", "train[]", "train[:]", "train[3]", "train[a:b]", "train[:5", "train[:5]]", "train[1:2:3]", "train:5"]
MALFORMED += ["train[:1.5]", "train[: 5]", "train+", "[:5]", "tra in", "train[:1__0]", "train[:--1]"]


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("field", ["train_split", "validation_split"])
def test_what_is_no_split(text, field):
    assert of_tfds(text, 9) is None
    with pytest.raises(ConfigError) as error:
        DataConfig(**{field: text})
    assert str(error.value).startswith(
        f"config field 'data.{field}' is {text!r}; expected the name of a split such as 'train', or"
    )
    assert "'train[:50]', 'train[-20:]', 'train[10%:20%]', 'train[:5]+train[20:25]'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train+val", "slices of one split, not of train and val"),
        ("train[:101%]", "percentages from -100 to 100"),
        ("train[-100.5%:]", "percentages from -100 to 100"),
        ("train[1shard:]", "the name of a split"),  # of TFDS, but not of ours
        ("train[10:50%]", "the name of a split"),  # TFDS takes both for percentages
    ],
)
def test_what_is_no_split_of_ours(text, expected):
    with pytest.raises(ConfigError, match=f"expected {expected}"):
        DataConfig(train_split=text)
