"""Precomputed latents on disk, what refuses them, and the windows that read them."""

import dataclasses
import itertools
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from synthetic import SIZE, ListSource, step_episode

from data_pipelines import precompute
from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.precompute import Chosen, create_latents, first_rows, latent_key, open_latents
from data_pipelines.sources.rlds import DatasetError, RldsSource
from data_pipelines.writers import write_rlds
from mimic_video.config import (
    ActionDecoderConfig,
    CompatConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    TextConfig,
    TokenizerConfig,
)

SHAPE = (2, 3, 4, 16)  # on disk, of one camera
KEY = {
    "tokenizer.kind": "pca",
    "data.cameras": ["primary"],
    "data.video_hz": 10.0,
    "data.image_size": [16, 32],
    "weights": "aa",
    "dataset": "bb",
}
WEIGHTS = {"encoder": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}, "scale": np.ones(1, np.float32)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Four windows in float32 and eight in bfloat16."""
    monkeypatch.setattr(precompute, "SHARD_BYTES", 4 * int(np.prod(SHAPE)) * 4 + 5)


def create(folder, dtype="float32", stride=1, key=KEY, rows=10):
    return create_latents(folder, key, stride=stride, rows=rows, shape=SHAPE, dtype=dtype)


def some_latents(rows=10, dtype="float32"):
    return np.random.default_rng(0).standard_normal((rows, 1, *SHAPE)).astype(dtype)


@pytest.fixture
def complete(tmp_path):
    cache = create(tmp_path / "latents")
    cache.write(range(cache.num_shards), iter(some_latents()))
    return cache


# On disk.


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 3), ("bfloat16", 2)])
def test_latents_come_back_bit_for_bit(tmp_path, dtype, shards):
    cache, latents = create(tmp_path, dtype), some_latents(dtype=dtype)
    assert cache.num_shards == shards and list(itertools.chain(*map(cache.rows_of, range(shards)))) == list(range(10))
    cache.write(range(shards), iter(latents))
    opened = open_latents(tmp_path, KEY)
    assert opened[0].dtype == np.dtype(dtype) and opened[0].shape == (1, *SHAPE)
    np.testing.assert_array_equal(np.stack([opened[row] for row in range(10)]), latents)


def test_cameras_stand_one_above_the_other_on_disk(tmp_path):
    """As versions without an axis of views wrote them."""
    key, latents = KEY | {"data.cameras": ["primary", "wrist"]}, np.concatenate([some_latents(4), some_latents(4) + 1], axis=1)
    frames, height, *rest = SHAPE
    cache = create_latents(tmp_path, key, stride=1, rows=4, shape=(frames, 2 * height, *rest), dtype="float32")
    cache.write(range(cache.num_shards), iter(latents))
    stored = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("*.npy"))])
    np.testing.assert_array_equal(stored[:, :, :height], latents[:, 0])
    np.testing.assert_array_equal(stored[:, :, height:], latents[:, 1])
    opened = open_latents(tmp_path, key)
    np.testing.assert_array_equal(np.stack([opened[row] for row in range(4)]), latents)


def test_parts_of_the_work_in_any_order(tmp_path):
    latents = some_latents()
    for shard in (2, 0):
        cache = create(tmp_path)
        cache.write([shard], iter(latents[cache.rows_of(shard)]))
    with pytest.raises(DatasetError, match=r"lack 1 of 3 shards \(00001\.npy\): launch/precompute_latents\.py continues"):
        open_latents(tmp_path, KEY)
    cache.write([1], iter(latents[cache.rows_of(1)]))
    np.testing.assert_array_equal(open_latents(tmp_path, KEY)[5], latents[5])


def test_an_interrupted_shard_is_not_there(tmp_path):
    def until_interrupted():
        yield from some_latents()[:6]
        raise KeyboardInterrupt

    cache = create(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.write([0, 1, 2], until_interrupted())
    assert create(tmp_path).missing() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.npy", "manifest.json"]


@pytest.mark.parametrize("kept", [0, 50, 1000])
def test_a_shard_that_was_cut_short_is_missing(complete, kept):
    path = complete.folder / "00001.npy"
    path.write_bytes(path.read_bytes()[:kept])
    assert complete.missing() == [1]
    with pytest.raises(DatasetError, match=r"lack 1 of 3 shards \(00001\.npy\)"):
        open_latents(complete.folder, KEY)
    with pytest.raises(DatasetError, match=r"shard .*00001\.npy of precomputed latents cannot be read"):
        complete[4]


def test_a_window_whose_frames_could_not_be_read(tmp_path):
    cache, latents = create(tmp_path, "bfloat16"), some_latents(dtype="bfloat16")
    latents[9] = np.nan
    cache.write(range(cache.num_shards), iter(latents))
    np.testing.assert_array_equal(cache[8], latents[8])
    with pytest.raises(DatasetError, match=r"shard .*00001\.npy has no latents of window 1"):
        cache[9]


def test_latents_that_are_not_there(tmp_path):
    with pytest.raises(DatasetError, match=rf"no precomputed latents in {tmp_path}/none: launch/precompute_latents\.py makes"):
        open_latents(tmp_path / "none", KEY)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"key": {}, "shape": [1], "pages": 3}'])
def test_a_damaged_manifest(complete, text):
    (complete.folder / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=r"manifest\.json of precomputed latents cannot be read"):
        open_latents(complete.folder, KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.video_hz": 5.0}, r"config field 'data\.video_hz' is 5\.0, there 10\.0$"),
        ({"data.image_size": [32, 32]}, r"'data\.image_size' is \[32, 32\], there \[16, 32\]$"),
        ({"weights": "cc"}, r"fit this experiment: another tokenizer made them$"),
        ({"dataset": "cc"}, r"fit this experiment: they are of another dataset, or of another version of it$"),
        ({"tokenizer.kind": "wan", "precision": "bfloat16"}, "'pca'; config field 'precision' is 'bfloat16', there None$"),
    ],
)
def test_another_key_names_what_differs(complete, change, message):
    for act in (open_latents, lambda folder, key: create(folder, key=key)):
        with pytest.raises(ConfigError, match=message) as error:
            act(complete.folder, KEY | change)
        assert str(complete.folder) in str(error.value)


def test_another_stride(complete):
    with pytest.raises(ConfigError, match=r"has latents at --stride=1, not 2"):
        create(complete.folder, stride=2)


# The key.


def key_of(tokenizer=WEIGHTS, dataset="bb", **changes):
    config = ExperimentConfig(data=DataConfig(image_size=SIZE))
    return latent_key(dataclasses.replace(config, **changes), tokenizer, dataset)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"data": DataConfig(image_size=(16, 64))}, {"data.image_size"}),
        ({"data": DataConfig(image_size=SIZE, past_frames=9)}, {"data.past_frames"}),
        ({"data": DataConfig(image_size=SIZE, future_frames=8)}, {"data.future_frames"}),
        ({"data": DataConfig(image_size=SIZE, video_hz=4.0)}, {"data.video_hz"}),
        ({"dataset": "cc"}, {"dataset"}),
        ({"tokenizer": WEIGHTS | {"scale": np.full(1, 1 + 2**-23, np.float32)}}, {"weights"}),
        ({"tokenizer": WEIGHTS | {"scale": np.ones(1, ml_dtypes.bfloat16)}}, {"weights"}),
        ({"tokenizer": WEIGHTS | {"scale": np.ones((1, 1), np.float32)}}, {"weights"}),
        ({"tokenizer": {"encoder": WEIGHTS["encoder"], "shift": WEIGHTS["scale"]}}, {"weights"}),
        ({"tokenizer": dict(reversed(WEIGHTS.items()))}, set()),
        # What latents do not depend on.
        ({"data": DataConfig(image_size=SIZE, action_delay=0.0, workers=2, latents="x"), "backbone_run": "y"}, set()),
        ({"precision": "bfloat16"}, set()),  # of the tokenizer pca, which computes in float32
        ({"text": TextConfig(rows=3), "seed": 4}, set()),
    ],
)
def test_the_key_covers_what_latents_depend_on(change, differs):
    before, after = key_of(), key_of(**change)
    assert {name for name in before | after if before.get(name) != after.get(name)} == differs


def test_the_key_of_the_wan_tokenizer():
    # latent_key's parameter "tokenizer" is the weights, so the configuration's own field is set here.
    config = ExperimentConfig(tokenizer=TokenizerConfig(kind="wan"))
    before = latent_key(config, WEIGHTS, "bb")
    for change, differs in (
        ({"precision": "bfloat16"}, {"precision"}),
        ({"compat": CompatConfig(bfloat16_latent_statistics=True)}, {"compat.bfloat16_latent_statistics"}),
        ({"compat": CompatConfig(bfloat16_rope=True)}, set()),
        ({"tokenizer": TokenizerConfig(kind="wan", chunk_latents=3)}, set()),
    ):
        after = latent_key(dataclasses.replace(config, **change), WEIGHTS, "bb")
        assert {name for name in before if before[name] != after[name]} == differs


def identity(directory, config):
    return WindowDataset(RldsSource(directory, "train"), config, actions=True).identity


def test_a_dataset_is_known_by_its_content(rlds, tmp_path, config, make_source):
    own = identity(rlds, config)
    copied = shutil.copytree(rlds, tmp_path / "elsewhere" / "1.0.0")
    assert identity(copied, config) == own == WindowDataset(RldsSource(rlds, "train"), config, actions=False).identity
    assert WindowDataset(RldsSource(rlds, "val"), config, actions=True).identity != own
    splits = {"train": [step_episode(n, episode=e) for e, n in enumerate((12, 20, 16))], "val": [step_episode(14, episode=3)]}
    longer = write_rlds(tmp_path / "longer", "steps_demo", splits, control_hz=10.0, image_size=SIZE, description="As rlds.")
    assert identity(longer, config) != own
    slow, fast = (WindowDataset(make_source(12, 20, hz=hz), config, actions=True) for hz in (10.0, 20.0))
    slow._source.identity = fast._source.identity = "the same frames"
    assert slow.identity != fast.identity


# Windows that read latents.


def test_rows_of_episodes():
    assert first_rows([4, 5, 1], 1).tolist() == [0, 4, 9, 10]
    assert first_rows([4, 5, 1], 2).tolist() == [0, 2, 5, 6]
    assert first_rows([4, 5, 1], 100).tolist() == [0, 1, 2, 3]


def cached(folder, frames, lengths, stride, dtype="float32"):
    """The windows of `frames` with latents whose value is 100·episode + anchor."""
    steps = [100 * episode + step for episode, length in enumerate(lengths) for step in range(0, length, stride)]
    cache = create(folder, dtype, stride, rows=len(steps))
    latents = np.broadcast_to(np.reshape(steps, (-1, 1, 1, 1, 1, 1)), (len(steps), 1, *SHAPE)).astype(dtype)
    cache.write(range(cache.num_shards), iter(latents))
    return frames.with_latents(cache)


@pytest.mark.parametrize("actions", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
def test_windows_have_the_latents_of_their_anchor(make_source, config, tmp_path, actions, stride):
    lengths = (12, 20, 9)
    source = make_source(*lengths)
    frames = WindowDataset(source, config, actions=actions)
    windows = cached(tmp_path, frames, lengths, stride)
    anchors = [(episode, step) for episode, n in enumerate(lengths) for step in range(0, n - actions, stride)]
    assert [int(window["latents"].flat[0]) for window in windows] == [100 * episode + step for episode, step in anchors]
    assert not any(episode.frames.taken for episode in source)  # nothing was decoded
    everything = {frames.place(number): number for number in range(len(frames))}
    for window, anchor in zip(windows, anchors, strict=True):
        of_frames = frames[everything[anchor]]
        assert set(window) == set(of_frames) - {"video"} | {"latents"}
        for name in set(window) - {"latents", "instruction"}:
            np.testing.assert_array_equal(window[name], of_frames[name])
    assert len(frames) == sum(lengths) - 3 * actions and "video" in frames[0]  # as it was
    assert windows.instructions == frames.instructions == ["do task 0", "do task 1"]


def test_a_slice_has_the_latents_of_its_split(rlds, config, tmp_path):
    lengths, stride = (12, 20, 15), 3
    whole = WindowDataset(RldsSource(rlds, "train"), config, actions=True)
    everything = cached(tmp_path, whole, lengths, stride)
    by_anchor = {round(float(window["proprio"][0, 0])): window for window in everything}
    for text in ("train[1:]", "train[1:2]", "train[2:]+train[:1]", "train"):
        part = WindowDataset(RldsSource(rlds, text), config, actions=True)
        chosen = part.chosen_of(whole)
        windows = part.with_latents(open_latents(tmp_path, KEY, chosen), chosen)
        assert len(windows) == sum(-(-(lengths[number] - 1) // stride) for number in part.numbers)
        for window in windows:
            anchor = round(float(window["proprio"][0, 0]))
            np.testing.assert_array_equal(window["latents"], by_anchor[anchor]["latents"])
            assert window["latents"].flat[0] == anchor and anchor // 100 in part.numbers


def test_an_episode_that_is_left_out_has_no_latents(make_source, config, tmp_path):
    """Of those that can be read, places count; of all, numbers."""

    class Damaged(ListSource):
        numbers = (0, 1, 2)

        def __getitem__(self, place):
            if self.numbers[place] == 1:
                raise DatasetError("episode 1 is damaged")
            return super().__getitem__(place)

    sources = Damaged(make_source(12, 20, 9)), Damaged(make_source(20, 9))
    sources[1].numbers = (1, 2)
    skipping = dataclasses.replace(config, skip_broken=True)
    whole, part = (WindowDataset(source, skipping, actions=True) for source in sources)
    assert whole.numbers == [0, 2] and part.numbers == [2]
    assert part.chosen_of(whole) == Chosen([12, 9], [1])
    assert part.chosen_of(whole).rows(3).tolist() == [[4, 7]]


def test_a_slice_needs_its_own_shards_only(tmp_path):
    cache = create(tmp_path)  # ten windows in three shards
    cache.write([1], iter(some_latents()[cache.rows_of(1)]))
    steps = [3, 2, 3, 2]
    for places, needed in (([1, 2], {0, 1}), ([2], {1}), ([3], {2}), ([0, 3], {0, 2}), ([0, 1, 2, 3], {0, 1, 2})):
        chosen = Chosen(steps, places)
        assert cache.shards_of(chosen) == needed and cache.missing(needed) == sorted(needed - {1})
        if needed == {1}:
            np.testing.assert_array_equal(open_latents(tmp_path, KEY, chosen)[5], some_latents()[5])
            continue
        with pytest.raises(DatasetError, match=rf"lack {len(needed - {1})} of {len(needed)} shards"):
            open_latents(tmp_path, KEY, chosen)


def no_text(instruction):
    return np.zeros((2, 3), np.float32)


def batches(windows, size, **options):
    mixture = Mixture([len(windows)], [Phase(0, (1.0,))], size, seed=7)
    options |= {"start_step": 0, "text": no_text, "decoder": ActionDecoderConfig(action_dim=2, proprio_dim=3)}
    return make_batches([Part("steps", windows)], mixture, batch_size=size, **options)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_batches_of_latents(make_source, config, tmp_path, workers):
    lengths = (12, 20, 9)
    windows = cached(tmp_path, WindowDataset(make_source(*lengths), config, actions=True), lengths, 2, "bfloat16")
    for batch in itertools.islice(batches(windows, 4, workers=workers), 3):
        assert (
            batch.observation.latents.shape == (4, 1, *SHAPE)
            and batch.observation.latents.dtype == ml_dtypes.bfloat16
            and batch.observation.video is None
        )
        np.testing.assert_array_equal(
            batch.observation.latents[:, 0, 0, 0, 0, 0], batch.observation.proprio[:, 0, 0].astype(ml_dtypes.bfloat16)
        )


def test_damaged_latents_are_skipped_where_broken_frames_would_be(make_source, config, tmp_path, caplog):
    lengths = (12, 20, 9)
    windows = cached(tmp_path, WindowDataset(make_source(*lengths), config, actions=False), lengths, 1)
    (tmp_path / "00004.npy").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"00004\.npy of precomputed latents cannot be read"):
        next(batches(windows, 41))
    with caplog.at_level("WARNING", logger="absl"):
        batch = next(batches(windows, 41, skip_broken=True))
    assert not {104, 105, 106, 107} & set(batch.observation.latents[:, 0, 0, 0, 0, 0].astype(int))
    assert len(re.findall("skipped a window", caplog.text)) >= 4
