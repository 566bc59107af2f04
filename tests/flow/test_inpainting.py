import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimic_video.flow import inpainting, solvers

E = np.e


def test_the_soft_mask_by_hand():
    """Frozen for two steps, then c·(e^c − 1)/(e − 1) for c = 3/4, 1/2, 1/4, then free."""
    soft = [c * (E**c - 1) / (E - 1) for c in (3 / 4, 1 / 2, 1 / 4)]
    np.testing.assert_allclose(inpainting.prefix_weights(8, 2, 5), [1, 1, *soft, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(inpainting.prefix_weights(4, 3, 3), [1, 1, 1, 0])
    np.testing.assert_array_equal(inpainting.prefix_weights(3, 0, 0), [0, 0, 0])
    assert inpainting.prefix_weights(4, 0, 4)[0] < 1  # without a delay nothing is frozen


@pytest.mark.parametrize(("delay", "overlap"), [(-1, 2), (3, 2), (0, 5)])
def test_masks_that_make_no_sense(delay, overlap):
    with pytest.raises(ValueError, match=f"delay is {delay} and overlap {overlap}; expected .* <= horizon=4"):
        inpainting.prefix_weights(4, delay, overlap)


def test_the_guidance_weight_by_hand():
    """1/2: (1/4 + 1/4)/(1/4); 1/5: (16/25 + 1/25)/(4/25); bounded where that grows beyond all measure."""
    weights = [inpainting.guidance_weight(jnp.float32(time), 5.0) for time in (1.0, 0.5, 0.2, 0.01)]
    np.testing.assert_allclose(weights, [5, 2, 4.25, 5], rtol=1e-6)


def test_the_correction_by_hand():
    """Of v = A·x, whose estimate is (1 − τA)·x: the transposed Jacobian, and no sign or factor else."""
    a, x, target = np.float32([[0.5, -1.0], [2.0, 0.25]]), np.float32([[[0.3], [-0.7]]]), np.float32([[[1.0], [4.0]]])
    weights, time, jacobian = np.float32([[1.0, 0.5]]), 0.5, np.eye(2) - 0.5 * a
    velocity = inpainting.guided(lambda x, time: jnp.einsum("ij,bjm->bim", a, x), target, weights, clip=5.0)
    residual = weights[0] * (target[0, :, 0] - jacobian @ x[0, :, 0])
    expected = a @ x[0, :, 0] - 2.0 * jacobian.T @ residual
    np.testing.assert_allclose(velocity(jnp.asarray(x), jnp.float32(time))[0, :, 0], expected, rtol=1e-5)


def gaussian_velocity(mean, covariance):
    """The exact velocity ε − x₀, given x_τ, of Gaussian data over the steps of a chunk."""

    def velocity(x, time):
        total = (1 - time) ** 2 * covariance + time**2 * jnp.eye(len(covariance))
        innovation = jnp.einsum("ij,bjm->bim", jnp.linalg.inv(total), x - (1 - time) * mean)
        return -mean + jnp.einsum("ij,bjm->bim", time * jnp.eye(len(covariance)) - (1 - time) * covariance, innovation)

    return velocity


def sample(velocity, noise, steps):
    return np.asarray(jax.jit(lambda noise: solvers.solve_euler(velocity, noise, steps))(noise))


def test_a_guided_sample_of_a_standard_normal_is_one_of_its_posterior():
    """Exactly so: what is fixed comes out, and the rest is what it would be without, since it is independent."""
    noise, target = jax.random.normal(jax.random.key(0), (2, 64, 4, 1))
    mean = jnp.asarray([1.0, -2.0, 0.5, 3.0])[:, None]
    velocity = gaussian_velocity(mean, jnp.eye(4))
    weights = jnp.tile(inpainting.prefix_weights(4, 2, 2), (64, 1))
    free = sample(velocity, noise, 50)
    fixed = sample(inpainting.guided(velocity, target, weights, clip=1e3), noise, 50)
    np.testing.assert_allclose(fixed[:, :2], target[:, :2], atol=0.02)
    np.testing.assert_allclose(fixed[:, 2:], free[:, 2:], atol=1e-5)


def test_what_depends_on_the_prefix_follows_it():
    """Of a chunk whose steps correlate: the free steps move to their conditional mean; with few steps and β = 5, too."""
    noise = jax.random.normal(jax.random.key(1), (512, 4, 1))
    covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    target = jnp.full((512, 4, 1), 2.0)
    velocity, weights = gaussian_velocity(0.0, jnp.asarray(covariance)), jnp.tile(inpainting.prefix_weights(4, 2, 2), (512, 1))
    free, led = sample(velocity, noise, 10), sample(inpainting.guided(velocity, target, weights, clip=5.0), noise, 10)
    conditional = 2.0 * 0.9 ** np.arange(1, 3)  # a first-order process depends on its last known step alone
    assert abs(free.mean()) < 0.1
    np.testing.assert_allclose(led[:, :2], 2.0, atol=0.25)
    np.testing.assert_allclose(led[:, 2:, 0].mean(0), conditional, atol=0.25)


def test_weights_of_zero_leave_a_flow_alone():
    noise, target = jax.random.normal(jax.random.key(2), (2, 3, 4, 1))
    velocity = gaussian_velocity(1.0, jnp.eye(4))
    led = sample(inpainting.guided(velocity, target, jnp.zeros((3, 4)), clip=5.0), noise, 5)
    np.testing.assert_allclose(led, sample(velocity, noise, 5), rtol=1e-6)
