import numpy as np
import pytest

from mimic_video.models.rope import rope_angles, rope_frequencies, rotate

RATIO = (1.0, 3.0, 3.0)
# SPEC 3.4: the published frequencies after their rounding to bfloat16, which moves them by up to 2.1%.
TEMPORAL = [1, .66015625, .431640625, .28515625, .1884765625, .123046875, .08056640625, .05322265625, .03515625, .0233154296875,
            .01513671875, .010009765625, .006500244140625, .004364013671875, .002838134765625, .00185394287109375,
            .00124359130859375, .000804901123046875, .00054168701171875, .0003528594970703125, .00022983551025390625,
            .00015354156494140625]  # fmt: skip
SPATIAL = [1, .609375, .373046875, .228515625, .138671875, .08447265625, .052001953125, .031494140625, .019287109375,
           .01190185546875, .00714111328125, .00439453125, .0027008056640625, .0016632080078125, .00098419189453125,
           .000606536865234375, .0003719329833984375, .00022983551025390625, .000141143798828125, 8.296966552734375e-05,
           5.1021575927734375e-05]  # fmt: skip


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_published_frequencies():
    angles = rope_angles((2, 2, 2), 128, RATIO)
    assert angles.shape == (8, 64) and angles.dtype == np.float32
    time, row, column = angles[4], angles[2], angles[1]  # tokens (1,0,0), (0,1,0), (0,0,1)
    np.testing.assert_allclose(time[:22], TEMPORAL, rtol=0.025)
    np.testing.assert_allclose(row[22:43], SPATIAL, rtol=0.025)
    np.testing.assert_allclose(column[43:], SPATIAL, rtol=0.025)
    np.testing.assert_array_equal(np.concatenate([angles[0], time[22:], row[:22], row[43:], column[:43]]), 0)
    np.testing.assert_allclose(time[:22], 10000.0 ** (-np.arange(22) / 22), rtol=1e-6)
    np.testing.assert_allclose(row[22:43], 31694.019 ** (-np.arange(21) / 21), rtol=1e-6)


def test_published_roundings_are_bit_exact():
    np.testing.assert_array_equal(rope_frequencies(44, 1.0, bfloat16=True), np.float32(TEMPORAL))
    np.testing.assert_array_equal(rope_frequencies(42, 3.0, bfloat16=True), np.float32(SPATIAL))


@pytest.mark.reference
def test_published_products_are_bit_exact():
    """The published code multiplies bfloat16 positions and frequencies."""
    import torch

    angles = rope_angles((16, 30, 40), 128, RATIO, bfloat16=True).reshape(16, 30, 40, 64)
    for axis, count, frequencies, part in (
        (0, 16, TEMPORAL, slice(0, 22)),
        (1, 30, SPATIAL, slice(22, 43)),
        (2, 40, SPATIAL, slice(43, 64)),
    ):
        expected = torch.outer(torch.arange(count, dtype=torch.bfloat16), torch.tensor(frequencies, dtype=torch.bfloat16))
        found = np.moveaxis(angles, axis, 0)[:, 0, 0, part]
        np.testing.assert_array_equal(found, expected.float().numpy())


def test_positions_count_patches_in_time_major_order():
    angles = rope_angles((3, 4, 5), 128, RATIO)
    positions = [(t, h, w) for t in range(3) for h in range(4) for w in range(5)]
    np.testing.assert_allclose(angles[:, [0, 22, 43]], positions, atol=1e-6)  # the first frequency of every axis is 1


@pytest.mark.parametrize("head_dim", [6, 16, 32, 128])
def test_attention_depends_on_relative_positions_only(head_dim):
    grid = (4, 5, 6)
    angles = rope_angles(grid, head_dim, RATIO)
    q, k = random(head_dim), random(head_dim, seed=1)
    rotated = [np.asarray(rotate(np.tile(x, (1, len(angles), 1, 1)), angles))[0, :, 0].reshape(*grid, head_dim) for x in (q, k)]

    def logit(query, key):
        return rotated[0][query] @ rotated[1][key]

    np.testing.assert_allclose(logit((0, 2, 1), (1, 0, 3)), logit((2, 4, 2), (3, 2, 4)), atol=1e-4)
    for moved in ((3, 2, 4), (2, 2, 4), (2, 0, 4), (2, 2, 0)):  # and do depend on them along every axis
        if moved != (3, 2, 4):
            assert abs(logit((2, 4, 2), moved) - logit((2, 4, 2), (3, 2, 4))) > 1e-3


def test_rotation_pairs_the_halves():
    angles = np.float32([[0.0, 0.0], [0.3, 1.2]])  # two tokens, heads of four
    x = np.float32([1, 2, 3, 4])
    y = np.asarray(rotate(np.tile(x, (1, 2, 1, 1)), angles))[0, :, 0]
    np.testing.assert_array_equal(y[0], x)
    (c0, c1), (s0, s1) = np.cos(angles[1]), np.sin(angles[1])
    expected = [1 * c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + 1 * s0, 4 * c1 + 2 * s1]
    np.testing.assert_allclose(y[1], expected, atol=1e-6)
