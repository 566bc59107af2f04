import collections

import numpy as np
import pytest

from data_pipelines.mixture import BLOCK, Mixture, Phase, block_counts, parse_mixture, shuffled
from mimic_video.config import ConfigError

SIZES, WEIGHTS = (100, 7, 2500, 31, 1), (5.0, 1.0, 3.0, 0.5, 0.013)


def samples(mixture, first, count):
    return [mixture[i] for i in range(first, first + count)]


def mixture(sizes=SIZES, phases=None, batch_size=32, seed=0):
    return Mixture(sizes, phases or (Phase(0, WEIGHTS),), batch_size, seed)


def test_counts_are_exact_in_every_block():
    counts = block_counts(WEIGHTS)
    assert counts.sum() == BLOCK
    np.testing.assert_array_less(np.abs(counts - BLOCK * np.array(WEIGHTS) / sum(WEIGHTS)), 1)
    mixed = mixture()
    for block in (0, 1, 17, 10**9):
        found = collections.Counter(dataset for dataset, _ in samples(mixed, block * BLOCK, BLOCK))
        assert [found[i] for i in range(len(SIZES))] == counts.tolist()


def test_every_window_comes_once_an_epoch():
    visits = collections.defaultdict(list)
    for dataset, window in samples(mixture(), 0, 8 * BLOCK):
        visits[dataset].append(window)
    orders = set()
    for dataset, size in enumerate(SIZES):
        for epoch in range(len(visits[dataset]) // size):
            part = visits[dataset][epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(size))
            if dataset == 0:
                orders.add(tuple(part))
    assert len(orders) > 40  # epochs differ


def test_a_sample_is_a_function_of_seed_and_number():
    forwards = samples(mixture(), 0, 3000)
    fresh = mixture()
    assert [fresh[i] for i in reversed(range(3000))] == forwards[::-1]
    assert samples(mixture(), 1000, 1000) == forwards[1000:2000]
    assert samples(mixture(seed=1), 0, 3000) != forwards
    blocks = [[dataset for dataset, _ in forwards[b * BLOCK : (b + 1) * BLOCK]] for b in (0, 1)]
    assert blocks[0] != blocks[1] and blocks[0] != sorted(blocks[0])


def test_weights_change_at_the_first_whole_block_after_their_step():
    phases = (Phase(0, (1.0, 1.0)), Phase(100, (1.0, 3.0)), Phase(200, (0.0, 1.0)))
    mixed = mixture((50, 60), phases)  # batches of 32: steps 100 and 200 are samples 3200 and 6400
    shares = [np.mean([dataset for dataset, _ in samples(mixed, block * BLOCK, BLOCK)]) for block in range(9)]
    assert shares == [0.5] * 4 + [0.75] * 3 + [1.0] * 2
    second = [window for dataset, window in samples(mixed, 0, 9 * BLOCK) if dataset == 1]
    for epoch in range(len(second) // 60):  # epochs run on across the changes
        assert sorted(second[epoch * 60 : (epoch + 1) * 60]) == list(range(60))


def test_parsing():
    assert parse_mixture("/data/bridge/1.0.0", "f") == (("/data/bridge/1.0.0",), (Phase(0, (1.0,)),))
    assert parse_mixture("a, b*2.5 ", "f") == (("a", "b"), (Phase(0, (1.0, 2.5)),))
    names, phases = parse_mixture("a*2,b;1000: b*3,gs://bucket/c; 5000:a", "f")
    assert names == ("a", "b", "gs://bucket/c")
    assert phases == (Phase(0, (2.0, 1.0, 0.0)), Phase(1000, (0.0, 3.0, 1.0)), Phase(5000, (1.0, 0.0, 0.0)))


def test_names_of_folders(tmp_path, monkeypatch):
    """A folder with a separator in its name is one dataset, as it stands or in quotes; `~` is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b*2;3:c", "d*2"):
        (tmp_path / name).mkdir()
    odd, star = str(tmp_path / "a,b*2;3:c"), str(tmp_path / "d*2")
    alone = (Phase(0, (1.0,)),)
    for text in (odd, f'"{odd}"', '"~/a,b*2;3:c"', "~/a,b*2;3:c"):
        assert parse_mixture(text, "f") == ((odd,), alone)
    assert parse_mixture(star, "f") == ((star,), alone)
    names, phases = parse_mixture(f'"{odd}" * 3,{star},~/e*4,gs://b/~;10:"{odd}",{star}*5', "f")
    assert names == (odd, star, str(tmp_path / "e"), "gs://b/~")
    assert phases == (Phase(0, (3.0, 1.0, 4.0, 1.0)), Phase(10, (1.0, 5.0, 0.0, 0.0)))
    with pytest.raises(ConfigError, match="config field 'f' is '~of_nobody/a'; expected a home directory"):
        parse_mixture("b,~of_nobody/a*2", "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "'f': '' is not a dataset"),
        ("*2", "is not a dataset"),
        ("a*", "is not a dataset"),
        ("a*-1", r"'f': 'a\*-1' is not a dataset, or a dataset\*weight"),
        ("a*much", r"'a\*much' is not"),
        ("a*nan", r"'a\*nan' is not"),
        ('"a', "'f': '\"a' is not a dataset"),
        ('"a"b', "is not a dataset"),
        ("a,b,a*2", "'f' names 'a' twice"),
        ("a;b", "'b' does not begin with the step"),
        ("a;100:b;50:a", "'50:a' does not begin with the step of a later phase"),
    ],
)
def test_text_that_is_no_mixture(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mixture(text, "f")


def test_a_dataset_without_windows():
    with pytest.raises(ConfigError, match="dataset number 2 of the mixture has no windows"):
        mixture((5, 0), (Phase(0, (1.0, 1.0)),))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_shuffling_is_a_permutation_that_differs_between_epochs(size):
    position = np.arange(size)
    orders = [shuffled(position, size, (3, 1), np.full(size, epoch)) for epoch in range(30)]
    for order in orders:
        assert sorted(order) == list(range(size))
    mean = np.mean(orders, axis=0)
    if size >= 1000:  # every position goes everywhere: means of 30 uniform draws
        assert len({tuple(order) for order in orders}) == 30
        np.testing.assert_allclose(mean.mean(), (size - 1) / 2)
        assert 0.8 < mean.std() / (size / np.sqrt(12 * 30)) < 1.2
        assert abs(np.corrcoef(orders[0], position)[0, 1]) < 0.1 and abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
