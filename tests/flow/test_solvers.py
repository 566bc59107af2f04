import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimic_video.flow import solvers

SIGMAS_35 = [
    80.000000, 68.325060, 58.142068, 49.288633, 41.616826, 34.992189, 29.292793, 24.408342, 20.239319, 16.696179, 13.698575,
    11.174633,
    9.060264, 7.298514, 5.838948, 4.637075, 3.653808, 2.854955, 2.210742, 1.695372, 1.286614, 0.965417, 0.715556, 0.523309,
    0.377149, 0.267475, 0.186359, 0.127313, 0.085087, 0.055484, 0.035187, 0.021618, 0.012807, 0.007272, 0.003929, 0.002000,
]  # SPEC 5, table  # fmt: skip
GOLDEN = {
    0: 80 * 1.764052345967664,
    1: 120.55440873933993,
    2: 102.61317868491084,
    3: 87.01440732619162,
    35: 0.006189753341074752,
}  # samples after that many steps, of x̂₀ = 0.1 x / (1+σ); SPEC 5


def test_noise_levels():
    sigmas = solvers.karras_sigmas(35)
    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas, SIGMAS_35, atol=6e-7)
    np.testing.assert_allclose(solvers.karras_sigmas(3)[[0, -1]], [80, 0.002], rtol=1e-12)


@pytest.mark.parametrize("steps", GOLDEN)
def test_published_trajectory(steps):
    def predict(x, sigma):
        return 0.1 * x / (1 + sigma)

    x = jax.jit(lambda x: solvers.solve_video(predict, x, solvers.karras_sigmas(35)[: steps + 1]))(jnp.float32(GOLDEN[0]))
    np.testing.assert_allclose(x, GOLDEN[steps], rtol=2e-6)


@pytest.mark.parametrize("kept", [(0, 1, 3, 35), (2,)])
def test_one_run_gives_the_samples_at_several_levels(kept):
    x = jnp.float32([GOLDEN[0], 1.0])
    path = solvers.video_path(lambda x, sigma: 0.1 * x / (1 + sigma), x, solvers.karras_sigmas(35), kept)
    assert path.shape == (len(kept), 2)
    np.testing.assert_allclose(path[:, 0], [GOLDEN[step] for step in kept], rtol=2e-6)


def test_published_trajectory_in_float64():
    sigmas, x, previous = solvers.karras_sigmas(35), GOLDEN[0], 0.0
    for step, (a, b, c) in enumerate(solvers.adams_bashforth_coefficients(sigmas)):
        x0 = 0.1 * x / (1 + sigmas[step])
        x, previous = a * x + b * x0 + c * previous, x0
        if step + 1 in GOLDEN:
            np.testing.assert_allclose(x, GOLDEN[step + 1], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 35])
def test_data_that_is_known_stays_on_its_straight_path(steps):
    x0, noise, sigmas = jnp.asarray([2.0, -1.0]), jnp.asarray([0.5, 3.0]), solvers.karras_sigmas(35)
    x = solvers.solve_video(lambda x, sigma: x0, x0 + sigmas[0] * noise, sigmas[: steps + 1])
    np.testing.assert_allclose(x, x0 + sigmas[steps] * noise, rtol=2e-5)


def test_later_steps_are_exact_for_estimates_linear_in_log_noise():
    # d x/dλ = x̂₀ − x with x̂₀ = pλ + q has the solution C·exp(−λ) + pλ + q − p.
    sigmas, p, q, constant = solvers.karras_sigmas(7), 0.7, -0.2, 1.3
    log_snr = -np.log(sigmas)
    x, x0 = constant * np.exp(-log_snr) + p * log_snr + q - p, p * log_snr + q
    for i, (a, b, c) in list(enumerate(solvers.adams_bashforth_coefficients(sigmas)))[1:]:
        np.testing.assert_allclose(a * x[i] + b * x0[i] + c * x0[i - 1], x[i + 1], rtol=1e-10)


def test_the_estimate_is_asked_for_at_every_noise_level_in_turn():
    sigmas, asked = solvers.karras_sigmas(5), []
    with jax.disable_jit():
        solvers.solve_video(lambda x, sigma: asked.append(float(sigma)) or x, jnp.ones(1), sigmas[:5])
    np.testing.assert_allclose(asked, sigmas[:4], rtol=1e-6)


def test_euler_recovers_data_from_its_exact_velocity():
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    for steps in (1, 3, 10):
        x = solvers.solve_euler(lambda x, time: (x - x0) / time, jnp.asarray(noise), steps)
        np.testing.assert_allclose(x, x0, atol=2e-6)


def test_euler_asks_from_pure_noise_down():
    asked = []
    with jax.disable_jit():
        x = solvers.solve_euler(lambda x, time: asked.append(float(time)) or time, jnp.zeros(()), 10)
    np.testing.assert_allclose(asked, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(x, -0.55, rtol=1e-5)


def test_a_grid_that_stops_at_a_flow_time():
    grid = solvers.karras_sigmas(35)
    for step in (1, 10, 35):
        time = grid[step] / (1 + grid[step])
        np.testing.assert_allclose(solvers.sigmas_until(grid, time), grid[: step + 1], rtol=1e-9)
    np.testing.assert_allclose(solvers.sigmas_until(grid, 0.98), [*grid[:4], 49.0])  # 49.29 is the last level above
    np.testing.assert_array_equal(solvers.sigmas_until(grid, 1.0), [np.inf])
    np.testing.assert_allclose(solvers.sigmas_until(grid, 0.99), [99.0])


def test_a_state_in_bfloat16_is_rounded_after_every_step():
    x, times = np.float32([1.234567, -0.7654321]), []
    rounded = x.astype(jnp.bfloat16)
    for step in range(4):
        rounded = (rounded.astype(np.float32) - (0.3 + step) / np.float32(4)).astype(jnp.bfloat16)
    velocity = lambda y, time: times.append(y.dtype) or 0.3 + (1 - time) * 4  # noqa: E731
    result = solvers.solve_euler(velocity, jnp.asarray(x), 4, jnp.bfloat16)
    assert result.dtype == jnp.float32 and set(times) == {np.dtype(np.float32)}
    np.testing.assert_array_equal(result, rounded.astype(np.float32))
