import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimic_video.config import NoiseConfig
from mimic_video.flow import matching

SAMPLES = 200_000


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_time_one_is_noise_and_time_zero_is_data():
    x0, noise = random(3, 4, 5), random(3, 4, 5, seed=1)
    np.testing.assert_array_equal(matching.interpolate(x0, noise, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(matching.interpolate(x0, noise, jnp.ones(3)), noise)


def test_each_sample_has_its_own_time():
    x0, noise, time = random(3, 4, 5), random(3, 4, 5, seed=1), np.float32([0.1, 0.5, 0.9])
    expected = np.stack([(1 - t) * a + t * e for t, a, e in zip(time, x0, noise, strict=True)])
    np.testing.assert_allclose(matching.interpolate(x0, noise, jnp.asarray(time)), expected, atol=1e-6)


def test_the_velocity_is_noise_minus_data():
    x0, noise, time = random(3, 4), random(3, 4, seed=1), jnp.asarray([0.1, 0.5, 1.0])
    x_tau = matching.interpolate(x0, noise, time)
    np.testing.assert_allclose(matching.denoised(x_tau, noise - x0, time), x0, atol=1e-6)
    _, slope = jax.jvp(lambda t: matching.interpolate(x0, noise, t), (time,), (jnp.ones(3),))
    np.testing.assert_allclose(slope, noise - x0, atol=1e-6)


def test_flow_time_of_noise_levels():  # SPEC 5, table
    sigmas, times = [80.0, 9.060264, 1.286614, 0.022, 0.002], [0.987654, 0.900599, 0.562672, 0.022 / 1.022, 0.001996]
    np.testing.assert_allclose(matching.flow_time(jnp.asarray(sigmas)), times, atol=1e-6)
    np.testing.assert_allclose(matching.CONDITION_TIME, 9.999e-5, rtol=1e-6)


def test_a_rescaled_sample_of_the_noise_level_is_the_point_on_the_path():  # SPEC 4.1: c_in · (x0 + σ ε)
    x0, noise, sigma = random(2, 7), random(2, 7, seed=1), np.float32([0.3, 80.0])
    time = matching.flow_time(jnp.asarray(sigma))
    expected = (x0 + sigma[:, None] * noise) / (1 + sigma[:, None])
    np.testing.assert_allclose(matching.interpolate(x0, noise, time), expected, atol=1e-6)


def sigmas(**changes):
    sample = jax.jit(matching.sample_video_sigma, static_argnums=(1, 2))
    return np.asarray(sample(jax.random.key(0), SAMPLES, NoiseConfig(**changes)))


def test_the_body_of_the_noise_levels_is_log_normal_around_four():
    logs = np.log(sigmas(tail_probability=0.0))
    np.testing.assert_allclose(np.median(logs), np.log(4), atol=0.015)
    np.testing.assert_allclose(logs.std(), 1.0, atol=0.01)
    np.testing.assert_allclose(np.quantile(logs, 0.8413), np.log(4) + 1, atol=0.02)
    logs = np.log(sigmas(tail_probability=0.0, scale=3.0, log_mean=-1.0, log_std=0.5))
    np.testing.assert_allclose([np.median(logs), logs.std()], [np.log(3) - 1, 0.5], atol=0.015)


def test_the_tail_of_the_noise_levels_is_log_uniform():
    logs = np.log(sigmas(tail_probability=1.0))
    low, high = np.log(200), np.log(1e5)
    assert low - 1e-4 <= logs.min() < low + 0.01 and high - 0.01 < logs.max() <= high + 1e-4
    np.testing.assert_allclose(np.quantile(logs, [0.25, 0.5, 0.75]), low + (high - low) * np.array([0.25, 0.5, 0.75]), atol=0.05)


def test_the_tails_share():
    values = sigmas()
    np.testing.assert_allclose(np.mean(values >= 200), 0.05, atol=0.002)
    np.testing.assert_allclose(np.median(values[values < 200]), 4.0, atol=0.05)
    assert np.isfinite(values).all() and values.min() > 0


def test_action_times_are_uniform_and_never_zero_or_one():
    times = np.asarray(jax.jit(matching.sample_action_time, static_argnums=1)(jax.random.key(0), (SAMPLES,)))
    assert 1e-3 <= times.min() < 1.1e-3 and 0.9999 < times.max() < 1
    np.testing.assert_allclose([times.mean(), times.std()], [0.5005, 0.999 / 12**0.5], atol=3e-3)
    np.testing.assert_allclose(np.quantile(times, [0.1, 0.9]), [0.1009, 0.9001], atol=5e-3)


@pytest.mark.parametrize("time", [1e-3, 0.3, 0.5, 0.99])
def test_the_decoders_input_has_unit_variance(time):
    x0, noise = random(SAMPLES), random(SAMPLES, seed=1)
    scaled = matching.scale_to_unit_variance(jnp.asarray((1 - time) * x0 + time * noise)[None], jnp.asarray([time]))
    np.testing.assert_allclose(np.std(scaled), 1.0, atol=0.01)


def test_the_decoders_input_scale():
    scaled = matching.scale_to_unit_variance(jnp.ones((3, 2, 2)), jnp.asarray([0.0, 0.5, 0.2]))
    np.testing.assert_allclose(scaled[:, 1, 1], [1.0, 2**0.5, 1 / 0.68**0.5], rtol=1e-6)


def test_condition_mask():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(matching.condition_mask(jnp.asarray([1, 2, 4]), 4), expected)


def test_conditioned_frames_are_given_clean_at_a_time_of_nearly_zero():
    clean, noisy = random(2, 2, 3, 1, 2, 4), random(2, 2, 3, 1, 2, 4, seed=1)  # two views
    mask = matching.condition_mask(jnp.asarray([1, 2]), 3)
    inputs, times = matching.frame_replacement(clean, noisy, jnp.asarray([0.25, 0.75]), mask)
    for view in (0, 1):
        given, other = clean[:, view], noisy[:, view]
        expected = [[given[0, 0], other[0, 1], other[0, 2]], [given[1, 0], given[1, 1], other[1, 2]]]
        np.testing.assert_array_equal(inputs[:, view], expected)
    t = 1e-4 / 1.0001
    np.testing.assert_allclose(times, [[t, 0.25, 0.25], [t, t, 0.75]], rtol=1e-6)


def test_weighted_mean():
    values, weights = random(2, 3, 4, 5), np.float32([[1, 0, 1], [0, 0, 1]])
    expected = np.mean([values[0, 0], values[0, 2], values[1, 2]])
    np.testing.assert_allclose(matching.weighted_mean(values, weights), expected, rtol=1e-5)
    values[0, 1], values[1, :2] = 1e6, -1e6
    np.testing.assert_allclose(matching.weighted_mean(values, weights), expected, rtol=1e-5)
    np.testing.assert_allclose(matching.weighted_mean(values, np.zeros((2, 3), np.float32)), 0.0)


def test_the_published_noise_stream():  # SPEC 5
    video = matching.numpy_noise(0, (1, 2, 3, 5, 4))
    assert video.shape == (1, 2, 3, 5, 4) and video.dtype == np.float32
    np.testing.assert_allclose(video[0, 0, 0, :, 0], [1.76405, 0.40016, 0.97874, 2.24089, 1.86756], atol=5e-6)
    stream = np.random.RandomState(0).standard_normal(120).astype(np.float32).reshape(1, 4, 2, 3, 5)  # channels second
    np.testing.assert_array_equal(video, stream.transpose(0, 2, 3, 4, 1))
    actions = matching.numpy_noise(3, (2, 5, 7))
    np.testing.assert_array_equal(actions.ravel(), np.random.RandomState(3).randn(70).astype(np.float32))


def test_the_published_loss_weight_is_an_error_of_velocities():  # SPEC 4.2
    x0, noise, output = random(3, 2, 4), random(3, 2, 4, seed=1), random(3, 2, 4, seed=2)
    for sigma in (0.01, 1.0, 80.0):
        time = matching.flow_time(jnp.full(3, sigma))
        x_tau = matching.interpolate(x0, noise, time)
        published = (1 + sigma) ** 2 / sigma**2 * (x0 - matching.denoised(x_tau, output, time)) ** 2
        np.testing.assert_allclose(published, (output - (noise - x0)) ** 2, rtol=1e-2 if sigma < 1 else 1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        NoiseConfig(),
        NoiseConfig(log_mean=1.0, log_std=0.5, scale=1.0, tail_probability=0.3, tail_range=(2.0, 50.0)),
    ],
    ids=["default", "overlapping"],
)
def test_quantiles_of_the_training_noise(config):
    probabilities = np.array([0.05, 0.35, 0.65, 0.9, 0.97])
    sigma = np.asarray(matching.sample_video_sigma(jax.random.key(0), SAMPLES, config))
    below = (sigma[:, None] < matching.video_sigma_quantiles(probabilities, config)).mean(axis=0)
    np.testing.assert_allclose(below, probabilities, atol=0.005)
