"""A stopped stream of batches goes on with the same samples, whatever the reader and the number of hosts and workers."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import SIZE, ArrayFrames, step_episode

from data_pipelines.loader import Part, WindowDataset, data_state, make_batches
from data_pipelines.mixture import BLOCK, Mixture, Phase
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds
from mimic_video.config import ActionDecoderConfig, DataConfig
from mimic_video.runs import checkpoints
from mimic_video.training.steps import TrainState

LENGTHS = {"one": (12, 20, 9), "two": (40,), "three": (7, 7, 7), "four": (30, 25), "five": (15, 11)}  # steps of episodes
WEIGHTS = (5.0, 1.0, 3.0, 0.5, 0.7)
COUNTS = [502, 101, 301, 50, 70]  # of 1024; by weight 501.96, 100.39, 301.18, 50.20, 70.27
CONFIG = DataConfig(
    image_size=SIZE, past_frames=1, future_frames=4, video_hz=10.0, action_horizon=4, control_hz=10.0, action_delay=0.1
)
DECODER = ActionDecoderConfig(action_dim=2, proprio_dim=3)
BATCH, STOP, NEXT = 64, 5, 16  # 1,024 samples after the stop, across the end of a block


def text(_: str) -> np.ndarray:
    return np.zeros((1, 1), np.float32)


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def directories(request, tmp_path_factory):
    """Five prepared datasets. Episodes are numbered through, so that proprioception tells the dataset, episode and step."""
    numbers = itertools.count()
    return [
        write_rlds(
            tmp_path_factory.mktemp(name),
            name,
            {"train": [step_episode(n, episode=next(numbers)) for n in lengths]},
            control_hz=10.0,
            image_size=SIZE,
            description="Steps that count.",
            file_format=request.param,
        )
        for name, lengths in LENGTHS.items()
    ]


def opened(directories):
    """The mixture as a process that starts anew opens it."""
    parts = [
        Part(name, WindowDataset(RldsSource(directory, "train"), CONFIG, actions=True))
        for name, directory in zip(LENGTHS, directories, strict=True)
    ]
    return parts, Mixture([len(part.windows) for part in parts], [Phase(0, WEIGHTS)], BATCH, seed=3)


def ids(parts, mixture, first, count, **options):
    """(count, rows) sample ids of this process: 100 · episode + step. The frame at the anchor has to be of that step, too."""
    stream = make_batches(parts, mixture, batch_size=BATCH, start_step=first, text=text, decoder=DECODER, **options)
    batches = list(itertools.islice(stream, count))
    found = np.stack([batch.observation.proprio[:, 0, 0] for batch in batches]).astype(int)
    shades = np.stack([batch.observation.video[:, 0, 0, 0, 0, 0] for batch in batches]).astype(int)
    assert np.abs(shades - 4 * (found % 100)).max() <= 1  # JPEG
    return found


@pytest.fixture(scope="module")
def whole(directories):
    """The ids of two blocks that nothing interrupts."""
    return ids(*opened(directories), 0, 2 * BLOCK // BATCH)


def restored(directories, run):
    """The data opened anew, and the step that a checkpoint after `STOP` steps continues from."""
    state = TrainState(step=jnp.int32(STOP), params={"w": jnp.zeros(2)}, opt_state={"m": jnp.zeros(2)}, ema={})
    with checkpoints.open_checkpoints(run, 1) as manager:
        checkpoints.save(manager, state, data_state(*opened(directories), STOP))
    again = opened(directories)
    with checkpoints.open_checkpoints(run, 1) as manager:
        checkpoints.require_same_data(manager, lambda step: data_state(*again, step))
        return again, int(checkpoints.restore(manager, state).step)


@pytest.mark.parametrize(
    ("hosts", "workers"),
    [
        (1, 0),
        (2, 0),
        (4, 0),
        *(pytest.param(*case, marks=pytest.mark.processes) for case in ((1, 1), (1, 2), (2, 2))),
    ],
)
def test_the_next_thousand_samples_are_those_of_the_uninterrupted_run(directories, whole, tmp_path, hosts, workers):
    mixed, step = restored(directories, tmp_path)
    rows = np.arange(BATCH).reshape(hosts, -1).tolist()
    shares = [ids(*mixed, step, NEXT, rows=rows[host], workers=workers) for host in range(hosts)]
    assert [share.shape for share in shares] == [(NEXT, BATCH // hosts)] * hosts
    expected = whole[STOP : STOP + NEXT]
    assert expected.size >= 1000 and len(np.unique(expected)) > 150
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), expected)


def test_frequencies_are_exact_in_every_block(whole):
    dataset_of = np.repeat(np.arange(len(LENGTHS)), [len(lengths) for lengths in LENGTHS.values()])  # of each episode
    for block in whole.reshape(2, BLOCK):
        assert np.bincount(dataset_of[block // 100]).tolist() == COUNTS


def test_both_readers_give_the_same_samples_and_are_the_same_data(tmp_path):
    """So a run continues on data that was converted in between, or lies elsewhere."""
    streams, states = [], []
    for file_format in ("tfrecord", "array_record"):
        directory = write_rlds(
            tmp_path / file_format,
            "steps",
            {"train": [step_episode(n, episode=n) for n in (9, 12, 20)]},
            control_hz=10.0,
            image_size=SIZE,
            description="",
            file_format=file_format,
        )
        part = Part("steps", WindowDataset(RldsSource(directory, "train"), CONFIG, actions=True))
        mixed = [part], Mixture([len(part.windows)], [Phase(0, (1.0,))], BATCH, seed=3)
        streams.append(ids(*mixed, 0, 4))
        states.append(data_state(*mixed, 4))
    np.testing.assert_array_equal(*streams)
    assert states[0] == states[1]
    assert states[0] | {"datasets": None} == {
        "next_step": 4,
        "next_sample": 256,
        "seed": 3,
        "batch_size": BATCH,
        "phases": [[0, [1.0]]],
        "datasets": None,
    }


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({"timestamps": np.arange(12) / 5.0}, {"content"}),
        ({"actions": np.full((12, 2), 0.5, np.float32)}, {"content"}),
        ({"proprio": np.zeros((12, 3), np.float32)}, {"content"}),
        ({"instruction": "do something else"}, {"content"}),
        ({"instruction": ("do task 1",) * 11 + ("stop",)}, {"content"}),
        ({"instruction": ("do task 1",) * 12}, set()),
        ({"action_layout": "delta"}, {"content"}),
        ({"name": "elsewhere", "frames": ArrayFrames(np.zeros((12, *SIZE, 3), np.uint8))}, set()),
    ],
)
def test_a_changed_episode_is_other_data(make_source, changed, differs):
    source = make_source(40, 12)
    before = content_of(source)
    source[1] = dataclasses.replace(source[1], **changed)
    assert {name for name, value in content_of(source).items() if value != before[name]} == differs


def test_a_slice_is_other_data_than_its_split_and_than_other_slices(directories):
    states = {}
    for text in ("train", "train[:2]", "train[1:]", "train[:100%]", "train[:1]+train[1:]"):
        part = Part("one", WindowDataset(RldsSource(directories[0], text), CONFIG, actions=True))
        states[text] = data_state([part], Mixture([len(part.windows)], [Phase(0, (1.0,))], BATCH, seed=3), 4)["datasets"]["one"]
    assert states["train"] == states["train[:100%]"] == states["train[:1]+train[1:]"]
    different = [states[text]["content"] for text in ("train", "train[:2]", "train[1:]")]
    assert len(set(different)) == 3 and [states[text]["windows"] for text in ("train[:2]", "train[1:]")] == [30, 27]


def test_episodes_that_are_missing_or_in_another_order_are_other_data(make_source):
    source = make_source(12, 12)
    before = content_of(source)
    source.reverse()
    assert content_of(source) == before | {"content": content_of(source)["content"]} != before
    del source[1]
    assert content_of(source)["windows"] == 11 and content_of(source)["content"] != before["content"]


def content_of(source):
    part = Part("memory", WindowDataset(source, CONFIG, actions=True))
    return data_state([part], Mixture([len(part.windows)], [Phase(0, (1.0,))], BATCH, seed=3), 0)["datasets"]["memory"]
