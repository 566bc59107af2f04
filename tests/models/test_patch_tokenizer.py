import jax.numpy as jnp
import numpy as np
import pytest

from mimic_video.models.patch_tokenizer import CHANNELS, PatchTokenizer, Projection

LOW_RANK = 9  # patterns that every patch is a mixture of


def videos(count, seed, frames=9, height=16, width=24):
    """Videos whose 8x8 patches, of single frames and of groups of four, are mixtures of a few fixed patterns."""
    patterns = np.random.default_rng(99).standard_normal((2, LOW_RANK, 4 * 8 * 8 * 3)).astype(np.float32) * 0.05
    random = np.random.default_rng(seed)
    groups = (frames - 1) // 4
    rows, columns = height // 8, width // 8
    first = random.standard_normal((count, 1, rows, columns, LOW_RANK)) @ patterns[0, :, : 8 * 8 * 3] + 0.1
    rest = random.standard_normal((count, groups, rows, columns, LOW_RANK)) @ patterns[1] - 0.2
    out = np.zeros((count, frames, height, width, 3), np.float32)
    for i in range(rows):
        for j in range(columns):
            box = (slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
            out[:, :1, *box] = first[:, :, i, j].reshape(count, 1, 8, 8, 3)
            out[:, 1:, *box] = rest[:, :, i, j].reshape(count, frames - 1, 8, 8, 3)
    return out


@pytest.fixture(scope="module")
def fitted():
    tokenizer = PatchTokenizer()
    return tokenizer, tokenizer.fit(videos(40, seed=0))


@pytest.mark.parametrize("groups", [0, 1, 2, 15])
def test_shapes(groups):
    tokenizer = PatchTokenizer()
    latents = tokenizer.encode(jnp.zeros((2, 1 + 4 * groups, 16, 24, 3)))
    assert latents.shape == (2, 1 + groups, 2, 3, CHANNELS)
    assert tokenizer.decode(latents).shape == (2, 1 + 4 * groups, 16, 24, 3)


def test_a_prefix_of_the_frames_gives_the_prefix_of_the_latents(fitted):
    tokenizer, video = fitted[0], np.random.default_rng(1).uniform(-1, 1, (2, 9, 16, 24, 3)).astype(np.float32)
    whole = tokenizer.encode(video)
    np.testing.assert_array_equal(tokenizer.encode(video[:, :1]), whole[:, :1])
    np.testing.assert_array_equal(tokenizer.encode(video[:, :5]), whole[:, :2])


def test_a_pixel_belongs_to_one_latent(fitted):
    tokenizer, video = fitted[0], np.zeros((1, 9, 16, 24, 3), np.float32)
    before = np.asarray(tokenizer.encode(video))
    owners = {(0, 7, 8): (0, 0, 1), (1, 8, 0): (1, 1, 0), (4, 0, 23): (1, 0, 2), (5, 15, 15): (2, 1, 1)}
    for (frame, row, column), owner in owners.items():
        changed = video.copy()
        changed[0, frame, row, column] = 1
        where = np.argwhere(np.abs(np.asarray(tokenizer.encode(changed)) - before).max(-1) > 1e-6)
        assert where.tolist() == [[0, *owner]]


def test_data_in_the_fitted_subspace_survives_the_round_trip(fitted):
    tokenizer, unexplained = fitted
    np.testing.assert_allclose(unexplained, 0, atol=1e-5)
    video = videos(3, seed=5)  # not among those that were fitted
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(video)), video, atol=1e-4)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(video[:, :1])), video[:, :1], atol=1e-4)


def test_latents_have_unit_variance_and_no_correlation(fitted):
    latents = np.asarray(fitted[0].encode(videos(40, seed=0)), np.float64)
    for part in (latents[:, :1], latents[:, 1:]):
        part = part.reshape(-1, CHANNELS)
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(np.cov(part[:, :LOW_RANK].T, bias=True), np.eye(LOW_RANK), atol=2e-3)
        np.testing.assert_allclose(part[:, LOW_RANK:], 0, atol=1e-2)  # channels that the data does not use are not blown up


def test_the_unexplained_share_is_what_the_reconstruction_misses():
    patches = np.random.default_rng(2).standard_normal((500, 24)).astype(np.float32) * np.arange(1, 25) + 3
    projection = Projection(24)
    share = projection.fit(patches)
    missed = np.asarray(projection.decode(projection.encode(patches))) - patches
    np.testing.assert_allclose(share, (missed**2).sum() / ((patches - patches.mean(0)) ** 2).sum(), rtol=1e-4)
    np.testing.assert_allclose(share, np.sum(np.arange(1, 9) ** 2) / np.sum(np.arange(1, 25) ** 2), rtol=0.15)  # the 8 smallest
