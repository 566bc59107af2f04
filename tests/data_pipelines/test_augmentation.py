"""Random crops and colours of training's windows."""

import colorsys
import dataclasses
import itertools
import json
import pathlib
import re

import chex
import ml_collections
import numpy as np
import pytest
import tiny
from PIL import Image
from synthetic import SIZE, ListSource, WristSource, step_episode

from data_pipelines.assembly import TrainingData
from data_pipelines.augmentation import Augmentation, Change, apply, colour_map
from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.writers import write_rlds
from mimic_video.config import ActionDecoderConfig, AugmentationConfig, ConfigError, experiment_from, to_dict

ALL = AugmentationConfig(
    crop_scale=(0.5, 0.9), crop_ratio=(0.8, 1.25), brightness=0.2, contrast=(0.7, 1.3), saturation=(0.5, 1.5), hue=0.1
)
CROPS = AugmentationConfig(crop_scale=(0.5, 0.9))
COLOURS = dataclasses.replace(ALL, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
WHOLE = Change(None, None)


def picture(height=48, width=64, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def changed(change, frames):
    out = np.empty_like(frames)
    apply(change, frames, out)
    return out


def recoloured(frame, *values):
    return changed(Change(None, colour_map(*values)), frame[None])[0]


def sample(cameras=2, frames=3, **arrays):
    """The same picture in every frame of every camera."""
    return {"video": np.broadcast_to(picture(), (cameras, frames, 48, 64, 3)), **arrays}


# What a change is.


def test_brightness_is_added_and_contrast_is_about_middle_grey():
    frame = picture()
    added = np.clip(frame.astype(int) + 51, 0, 255)
    np.testing.assert_array_less(abs(recoloured(frame, 0.2, 1.0, 1.0, 0.0) - added), 2)  # Rounding of 0.5 either way
    spread = np.clip((frame - 127.5) * 1.5 + 127.5, 0, 255)
    np.testing.assert_array_less(abs(recoloured(frame, 0.0, 1.5, 1.0, 0.0) - spread), 1.01)


@pytest.mark.parametrize("saturation", [0.0, 0.5, 1.4])
def test_saturation_is_a_factor_of_the_distance_from_the_grey_of_the_same_luma(saturation):
    """As Pillow's own enhancer, which rounds the grey once more."""
    from PIL import ImageEnhance

    frame = picture() // 2 + 64  # so that nothing is clipped
    expected = np.asarray(ImageEnhance.Color(Image.fromarray(frame)).enhance(saturation)).astype(int)
    assert abs(recoloured(frame, 0.0, 1.0, saturation, 0.0) - expected).max() <= 2


def test_hues_turn_and_greys_and_luma_stay():
    grey = np.full((8, 8, 3), 90, np.uint8)
    np.testing.assert_array_equal(recoloured(grey, 0.0, 1.0, 1.7, 0.3), grey)
    frame = picture() // 4 + 96
    turned = recoloured(frame, 0.0, 1.0, 1.0, 0.25)
    luma = np.array([0.299, 0.587, 0.114])
    assert abs(turned @ luma - frame @ luma).max() < 1.0  # three roundings
    assert abs(turned.astype(int) - frame).max() > 10
    back = recoloured(turned, 0.0, 1.0, 1.0, -0.25)
    assert abs(back.astype(int) - frame).max() <= 2
    hues = [
        colorsys.rgb_to_hsv(*recoloured(np.uint8([[[150, 100, 100]]]), 0.0, 1.0, 1.0, turn)[0, 0])[0] for turn in (0.02, -0.02)
    ]
    assert (hues[0] > 0.9 and 0.0 < hues[1] < 0.1) or (hues[1] > 0.9 and 0.0 < hues[0] < 0.1)  # either side of red


def test_a_crop_is_resized_as_everywhere_else():
    frame = picture()
    crop = changed(Change((0.25, 0.5, 0.75, 1.0), None), frame[None])[0]
    expected = Image.fromarray(frame[24:, 16:48]).resize((64, 48), Image.Resampling.BILINEAR)
    inner = slice(2, -2)  # at its edges a crop sees what lies outside
    assert abs(crop[inner, inner].astype(int) - np.asarray(expected)[inner, inner]).max() <= 1
    np.testing.assert_array_equal(changed(WHOLE, frame[None])[0], frame)


# What is drawn.


def test_draws_are_in_their_ranges_and_fill_them():
    augmentation = Augmentation(dataclasses.replace(CROPS, crop_ratio=(0.8, 1.25)), ("primary",), seed=3)
    boxes = np.array([augmentation.draw(number)[0].box for number in range(300)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-9
    area = width * height
    assert 0.5 <= area.min() < 0.52 and 0.88 < area.max() <= 0.9 + 1e-9
    ratio = (width / height)[width < 1 - 1e-9]
    assert 0.8 - 1e-9 <= ratio.min() < 0.83 and 1.2 < ratio.max() <= 1.25 + 1e-9
    assert boxes[:, 0].std() > 0.03 and boxes[:, 1].std() > 0.03  # anywhere, not in the middle


def test_a_camera_has_its_own_draw_for_all_of_its_frames():
    augmentation = Augmentation(ALL, ("primary", "secondary"), seed=0)
    first, second = augmentation(sample(), 5)["video"]
    for view in (first, second):
        assert (view == view[:1]).all() and (view[0] != picture()).any()
    assert (first[0] != second[0]).any()


def test_draws_depend_on_the_seed_and_the_sample_alone():
    def video(seed, number):
        return Augmentation(ALL, ("primary", "secondary"), seed)(sample(), number)["video"]

    np.testing.assert_array_equal(video(1, 7), video(1, 7))
    assert (video(1, 7) != video(2, 7)).any() and (video(1, 7) != video(1, 8)).any()


def test_wrist_cameras_are_not_cropped_and_cameras_that_lack_stay_black():
    cameras = ("primary", "secondary", "wrist")
    assert [change.box is None for change in Augmentation(ALL, cameras, 0).draw(4)] == [False, False, True]
    video = Augmentation(CROPS, cameras, 0)(sample(3), 4)["video"]
    np.testing.assert_array_equal(video[2], sample(3)["video"][2])
    assert (video[0] != sample(3)["video"][0]).any()
    black = sample(3)
    black["video"] = black["video"].copy()
    black["video"][1] = 0
    bright = Augmentation(dataclasses.replace(COLOURS, brightness=0.9), cameras, 0)
    for number in range(5):
        video = bright(black | {"view_mask": np.array([True, False, True])}, number)["video"]
        assert not video[1].any() and (video[2] != black["video"][2]).any()


# In training.


def stream(windows, start, count, augmentation, rows=None, **options):
    mixture = Mixture([len(windows)], [Phase(0, (1.0,))], 4, 11)
    batches = make_batches(
        [Part("steps", windows)],
        mixture,
        batch_size=4,
        start_step=start,
        text=words,
        decoder=ActionDecoderConfig(action_dim=2, proprio_dim=3),
        augmentation=augmentation,
        rows=rows,
        **options,
    )
    return [batch.observation for batch in itertools.islice(batches, count)]


def words(_):
    return np.zeros((1, 1), np.float32)


def test_batches_do_not_depend_on_hosts_or_where_a_run_went_on(config):
    config = dataclasses.replace(config, cameras=("primary", "wrist"))
    windows, augmentation = WindowDataset(WristSource(12, 20), config, actions=True), Augmentation(ALL, config.cameras, 11)
    whole = stream(windows, 0, 6, augmentation)
    for expected, resumed in zip(whole[3:], stream(windows, 3, 3, augmentation), strict=True):
        chex.assert_trees_all_equal(resumed, expected)
    for rows in ([0, 3], [1, 2]):
        for expected, part in zip(whole, stream(windows, 0, 6, augmentation, rows=rows), strict=True):
            np.testing.assert_array_equal(part.video, expected.video[rows])
    plain = stream(windows, 0, 6, None)
    for one, other in zip(whole, plain, strict=True):
        np.testing.assert_array_equal(one.proprio, other.proprio)
        assert (one.video != other.video).any()


def test_frames_that_are_kept_decoded_stay_as_they_were(config):
    windows, augmentation = (
        WindowDataset(ListSource([step_episode(12)]), config, actions=True),
        Augmentation(ALL, ("primary",), 0),
    )
    before = [windows[index]["video"].copy() for index in range(len(windows))]
    stream(windows, 0, 8, augmentation)
    for index, video in enumerate(before):
        np.testing.assert_array_equal(windows[index]["video"], video)


@pytest.mark.processes
def test_worker_processes_draw_the_same(config):
    windows, augmentation = (
        WindowDataset(ListSource([step_episode(40)]), config, actions=True),
        Augmentation(ALL, ("primary",), 11),
    )
    for one, other in zip(stream(windows, 0, 5, augmentation), stream(windows, 0, 5, augmentation, workers=2), strict=True):
        chex.assert_trees_all_equal(one, other)


def test_training_alone_is_augmented(tmp_path):
    splits = {name: [step_episode(20, episode=e) for e in range(2)] for name in ("train", "val")}
    path = str(write_rlds(tmp_path, "steps", splits, control_hz=10.0, image_size=SIZE, description=""))
    fields = {"data": {"action_dataset": path}, "train": {"validate_every": 2, "validation_batches": 2}}
    plain = TrainingData(tiny.experiment(**fields)).open()
    with_crops = fields | {"data": fields["data"] | {"augmentation": {"brightness": 0.3}}}
    data = TrainingData(tiny.experiment(**with_crops)).open()
    ours, theirs = next(data.batches(0)).observation, next(plain.batches(0)).observation
    assert (ours.video != theirs.video).any()
    np.testing.assert_array_equal(ours.proprio, theirs.proprio)
    for one, other in zip(data.validation(), plain.validation(), strict=True):
        chex.assert_trees_all_equal(one, other)
    for one, other in zip(data.samples(3), plain.samples(3), strict=True):  # what a tokenizer is fitted to
        np.testing.assert_array_equal(one["video"], other["video"])


# Its configuration.


def test_it_is_off_by_default_and_survives_json():
    assert not AugmentationConfig().on and not experiment_from({}).data.augmentation.on
    for fields in ({"crop_scale": [0.8, 1.0]}, {"hue": 0.05}, {"saturation": (0.9, 1.1)}):
        config = experiment_from({"data": {"augmentation": fields}})
        assert config.data.augmentation.on and experiment_from(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("crop_scale", (0.0, 1.0), "0 < low <= high <= 1"),
        ("crop_scale", (0.9, 0.8), "0 < low <= high <= 1"),
        ("crop_scale", (0.9, 1.1), "0 < low <= high <= 1"),
        ("crop_ratio", (1.1, 0.9), "low <= high, both at least 0.001"),
        ("crop_ratio", (0.0, 1.0), "low <= high, both at least 0.001"),
        ("contrast", (-0.5, 1.0), "low <= high, both at least 0.001"),
        ("saturation", (-0.1, 1.0), "low <= high, both at least 0"),
        ("brightness", 1.0, "a share below 1"),
        ("brightness", -0.1, "a share below 1"),
        ("hue", 0.6, "0.5, half a turn"),
    ],
)
def test_ranges_are_checked(field, value, expected):
    with pytest.raises(ConfigError) as error:
        experiment_from({"data": {"augmentation": {field: value}}})
    assert str(error.value).startswith(f"config field 'data.augmentation.{field}' is {value}; expected ")
    assert expected in str(error.value)
    with pytest.raises(
        ConfigError, match=r"unknown config field 'data\.augmentation\.huee'; did you mean 'data\.augmentation\.hue'"
    ):
        experiment_from({"data": {"augmentation": {"huee": 1}}})


def test_latents_are_refused():
    fields = {"latents": "runs/latents", "augmentation": {"hue": 0.1}}
    with pytest.raises(ConfigError, match=r"'data\.latents' is 'runs/latents'; expected '', since data\.augmentation"):
        experiment_from({"backbone_run": "runs/video", "data": fields})
    experiment_from({"backbone_run": "runs/video", "data": {"latents": "runs/latents"}})


def test_the_document_switches_all_of_it_on():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "augmentation.md").read_text("utf-8")
    config = ml_collections.ConfigDict(to_dict(tiny.experiment()))
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {"config": config})
    found = experiment_from(config).data.augmentation
    off = AugmentationConfig()
    assert not [field for field, value in vars(found).items() if value == vars(off)[field]]
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(vars(off))
