import dataclasses
import json

import numpy as np
import pytest

from mimic_video.transforms import Normalizer, compute_statistics, from_json, resize_images, to_json


@pytest.fixture
def samples() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(1000, 3, 2)).astype(np.float32) * [1.0, 50.0] + [0.0, 7.0]


@pytest.fixture
def statistics(samples):
    return compute_statistics(samples)


def test_statistics_by_hand():
    # 0, 1, …, 100 in one dimension, and twice that plus the step in the other
    values = np.arange(101.0)[:, None, None] * [1.0, 2.0] + np.arange(2.0)[:, None] * [0.0, 1.0]
    statistics = compute_statistics(values)
    np.testing.assert_allclose(statistics.mean, [[50, 100], [50, 101]])
    np.testing.assert_allclose(statistics.percentiles[[20, 980], 0], [[2, 4], [98, 196]], rtol=1e-6)
    np.testing.assert_allclose(statistics.percentiles[1, 0, 0], 0.1, rtol=1e-5)
    np.testing.assert_allclose(statistics.clamp_min, [[-22, -44], [-22, -43]], rtol=1e-5)  # 50 + 1.5 (2 − 50)
    np.testing.assert_allclose(statistics.clamp_max[0], [122, 244], rtol=1e-5)
    np.testing.assert_allclose(statistics.std_clamped, statistics.std)  # nothing was clamped
    np.testing.assert_allclose(statistics.std[0], np.std(np.arange(101)) * np.array([1, 2]), rtol=1e-6)
    assert {value.dtype for value in vars(statistics).values()} == {np.dtype(np.float32)}


def test_outliers_are_clamped_in_the_clamped_moments_only():
    values = np.concatenate([np.linspace(-1, 1, 1000), [1e4, -1e4]])[:, None, None]
    statistics = compute_statistics(values)
    assert statistics.std[0, 0] > 100
    expected = np.clip(values, statistics.clamp_min, statistics.clamp_max)
    np.testing.assert_allclose(statistics.std_clamped, expected.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.mean_clamped, expected.mean(axis=0), atol=1e-6)
    assert 0.5 < statistics.std_clamped[0, 0] < 0.65


@pytest.mark.parametrize("bad, message", [(np.zeros((0, 3, 2)), r"\(0, 3, 2\)"), (np.zeros((4, 2)), r"\(4, 2\)"),
                                          (np.full((1, 1, 2), np.nan), r"\(0, 0, 0\)")])
def test_unusable_samples_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        compute_statistics(bad)


@pytest.mark.parametrize("mode", ["none", "identity", "variance", "squash", "squash_hard"])
def test_round_trip_inside_the_bounds(statistics, samples, mode):
    normalizer = Normalizer.from_statistics(statistics, mode)
    inside = np.clip(samples, statistics.percentiles[20], statistics.percentiles[980]).reshape(10, 100, 3, 2)  # two batch axes
    normalized = normalizer.normalize(inside)
    assert normalized.dtype == np.float32 and normalized.shape == inside.shape
    np.testing.assert_allclose(normalizer.unnormalize(normalized), inside, rtol=1e-5, atol=1e-5)


def test_variance_standardises_and_clamps(statistics, samples):
    normalizer = Normalizer.from_statistics(statistics, "variance")
    clamped = np.clip(samples, statistics.clamp_min, statistics.clamp_max)
    normalized = normalizer.normalize(samples)
    np.testing.assert_allclose(normalized.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(normalizer.unnormalize(normalized), clamped, rtol=1e-4, atol=1e-4)
    top = normalizer.unnormalize(normalizer.normalize(np.full((3, 2), 1e6)))
    np.testing.assert_allclose(top, statistics.clamp_max, rtol=1e-5)


def test_squash_maps_the_percentiles_to_one_and_clamps_beyond(statistics):
    normalizer = Normalizer.from_statistics(statistics, "squash")
    np.testing.assert_allclose(normalizer.normalize(statistics.percentiles[20]), -1, atol=1e-5)
    np.testing.assert_allclose(normalizer.normalize(statistics.percentiles[980]), 1, atol=1e-5)
    np.testing.assert_array_equal(normalizer.normalize(np.full((3, 2), 1e6)), 1.5)


def test_squash_hard_maps_the_reachable_range_to_one():
    statistics = compute_statistics(np.arange(101.0)[:, None, None])
    normalizer = Normalizer.from_statistics(statistics, "squash_hard")  # 50 ± 72 reaches beyond the data: [0, 100]
    values = np.array([0.0, 50.0, 100.0, 999.0])[:, None, None]
    np.testing.assert_allclose(normalizer.normalize(values).ravel(), [-1, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize("mode", ["variance", "squash", "squash_hard"])
def test_a_constant_dimension_is_shifted_not_divided(mode):
    normalizer = Normalizer.from_statistics(compute_statistics(np.full((5, 1, 1), 3.0)), mode)
    np.testing.assert_array_equal(normalizer.normalize(np.array([[3.0]])), 0)
    np.testing.assert_array_equal(normalizer.unnormalize(np.array([[0.0]])), 3)


def test_shape_errors_name_the_key_and_both_shapes(statistics):
    normalizer = Normalizer.from_statistics(statistics, "identity", key="action")
    for method in (normalizer.normalize, normalizer.unnormalize):
        with pytest.raises(ValueError, match=r"'action' has shape \(4, 5, 2\).*3, 2\)"):
            method(np.zeros((4, 5, 2)))
    with pytest.raises(ValueError, match=r"'action' is 'cube'"):
        Normalizer.from_statistics(statistics, "cube", key="action")


def test_json_round_trip_is_exact(statistics):
    published = json.loads(json.dumps(to_json({"action": statistics})))
    assert np.shape(published["action"]["percentiles"]) == (1001, 3, 2)
    restored = from_json(published)["action"]
    for field in dataclasses.fields(statistics):
        np.testing.assert_array_equal(getattr(restored, field.name), getattr(statistics, field.name))


def test_json_errors_name_key_and_field(statistics):
    missing = to_json({"action": statistics})
    del missing["action"]["std"]
    with pytest.raises(ValueError, match=r"'action': missing fields \['std'\]"):
        from_json(missing)
    misshapen = to_json({"action": statistics})
    misshapen["action"]["percentiles"].pop()
    with pytest.raises(ValueError, match=r"'action': 'percentiles' has shape \(1000, 3, 2\)"):
        from_json(misshapen)


def test_resize_averages_when_shrinking_and_keeps_what_fits():
    images = np.zeros((2, 1, 8, 8, 3), np.uint8)
    images[0, 0, :, ::2] = 200  # vertical stripes average to grey: no aliasing
    images[1] = 50
    resized = resize_images(images, (2, 4))
    assert resized.shape == (2, 1, 2, 4, 3) and resized.dtype == np.uint8
    np.testing.assert_allclose(resized[0, 0, :, 1:3], 100, atol=2)
    np.testing.assert_array_equal(resized[1], 50)
    assert resize_images(images, (8, 8)) is images
    with pytest.raises(ValueError, match="float32"):
        resize_images(images.astype(np.float32), (2, 4))
