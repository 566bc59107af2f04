import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mimic_video.transforms import (
    PUBLISHED_STATISTICS,
    Normalizer,
    Statistics,
    absolute_poses,
    clamped,
    compute_statistics,
    from_json,
    matrix_from_rot6d,
    relative_poses,
    remarks,
    resize_images,
    rot6d_from_matrix,
    statistics_from_published,
    statistics_to_published,
    to_json,
)


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


@pytest.mark.parametrize(
    "bad, message",
    [(np.zeros((0, 3, 2)), r"\(0, 3, 2\)"), (np.zeros((4, 2)), r"\(4, 2\)"), (np.full((1, 1, 2), np.nan), r"\(0, 0, 0\)")],
)
def test_unusable_samples_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        compute_statistics(bad)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("mode", ["identity", "variance", "squash", "squash_hard"])
def test_round_trip_inside_the_bounds(statistics, samples, mode, clamp):
    normalizer = Normalizer.from_statistics(statistics, mode, percentile_clamp=clamp)
    inside = np.clip(samples, statistics.percentiles[20], statistics.percentiles[980]).reshape(10, 100, 3, 2)  # two batch axes
    normalized = normalizer.normalize(inside)
    assert normalized.dtype == np.float32 and normalized.shape == inside.shape
    np.testing.assert_allclose(normalizer.unnormalize(normalized), inside, rtol=1e-5, atol=1e-5)


def test_variance_standardises_and_clamps(statistics, samples):
    normalizer = Normalizer.from_statistics(statistics, "variance", percentile_clamp=True)
    clamped = np.clip(samples, statistics.clamp_min, statistics.clamp_max)
    normalized = normalizer.normalize(samples)
    np.testing.assert_allclose(normalized.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(normalizer.unnormalize(normalized), clamped, rtol=1e-4, atol=1e-4)
    top = normalizer.unnormalize(normalizer.normalize(np.full((3, 2), 1e6)))
    np.testing.assert_allclose(top, statistics.clamp_max, rtol=1e-5)


def test_squash_maps_the_percentiles_to_one_and_clamps_beyond(statistics):
    normalizer = Normalizer.from_statistics(statistics, "squash", percentile_clamp=True)
    np.testing.assert_allclose(normalizer.normalize(statistics.percentiles[20]), -1, atol=1e-5)
    np.testing.assert_allclose(normalizer.normalize(statistics.percentiles[980]), 1, atol=1e-5)
    np.testing.assert_array_equal(normalizer.normalize(np.full((3, 2), 1e6)), 1.5)


def test_squash_hard_maps_the_reachable_range_to_one():
    statistics = compute_statistics(np.arange(101.0)[:, None, None])
    values = np.array([0.0, 50.0, 100.0, 999.0])[:, None, None]
    for clamp in (False, True):  # 50 ± 72 reaches beyond the data: [0, 100]
        normalizer = Normalizer.from_statistics(statistics, "squash_hard", percentile_clamp=clamp)
        np.testing.assert_allclose(normalizer.normalize(values).ravel(), [-1, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mode", ["variance", "squash", "squash_hard"])
def test_what_is_rare_survives_at_a_size_that_can_be_learned(mode, dtype):
    """Events of 1 %, 0.1 % and at one step of the horizon alone, with and without noise around zero."""
    rng, count = np.random.default_rng(3), 4000
    values = np.zeros((count, 2, 4), np.float32)
    values[:40, :, 0], values[:4, :, 1], values[:60, 1, 2] = 1.0, -255.0, 0.08
    values[..., 3] = rng.normal(0, 1e-3, (count, 2))
    values[:40, :, 3] = 0.7  # a rare rotation
    statistics = compute_statistics(rng.permutation(values))
    normalizer = Normalizer.from_statistics(statistics, mode, dtype=dtype)
    normalized = normalizer.normalize(values)
    error, size = (np.abs(x).max((0, 1)) for x in (normalizer.unnormalize(normalized) - values, values))
    assert (error <= size * (1e-6 if dtype == np.float32 else 2**-6)).all()
    event = np.abs(normalized - np.median(normalized, axis=0)).max(0)
    assert (event[:, [0, 1, 3]] > 1).all() and event[1, 2] > 1 and event.max() <= 1.02 / np.sqrt(4 / count)
    assert event[0, 2] == 0  # constant there
    assert not clamped(statistics, Normalizer.from_statistics(statistics, mode)).any()


@pytest.mark.parametrize("mode", ["variance", "squash", "squash_hard"])
def test_a_clamp_that_loses_what_is_rare_is_remarked_upon(mode):
    values = np.random.default_rng(4).normal(0, 0.01, (1000, 2, 4))
    values[..., 1] = 0
    values[:10, :, 1], values[:10, 1, 2], values[..., 3] = 255.0, 1.0, 7.0
    statistics = compute_statistics(values)
    published = Normalizer.from_statistics(statistics, mode, "action", percentile_clamp=True)
    # 255 is lost: without a range there is no scale, so that 1.5 and 1 are raw units.
    assert np.ptp(published.normalize(values)[..., 1]) == {"variance": 0, "squash": 1.5, "squash_hard": 1}[mode]
    first, second = remarks(statistics, published)
    assert re.fullmatch(
        r"the clamp changes \d+\.\d% of action dimension 1, which is 0 to 255, and leaves .* to .*; "
        "compat.percentile_clamp=False keeps them",
        first,
    )
    assert re.match(r"the clamp changes 1\.\d% of action dimension 2, which is -0\.0\d* to 1, and leaves -0\.\d* to 0\.", second)
    assert remarks(statistics, Normalizer.from_statistics(statistics, mode, "action")) == []
    raw = Normalizer.from_statistics(statistics, mode, "action", raw_dims=(1, 2), percentile_clamp=True)
    assert remarks(statistics, raw) == []


def test_values_far_from_all_others_are_remarked_upon():
    values = np.random.default_rng(4).normal(size=(4000, 1, 2))
    values[7, 0, 1] = 1e4
    statistics = compute_statistics(values)
    (remark,) = remarks(statistics, Normalizer.from_statistics(statistics, "variance", "proprio"))
    assert re.fullmatch(
        r"proprio dimension 1, which is -\d.* to 1e\+04, has some at 63 standard deviations from the mean: errors there spoil "
        "its scale",
        remark,
    )
    assert remarks(statistics, Normalizer.from_statistics(statistics, "variance", raw_dims=(1,))) == []


def test_dimensions_of_two_values():
    rng = np.random.default_rng(5)
    values = rng.normal(size=(500, 3, 6))
    values[..., 1] = rng.choice([-1.0, 1.0], (500, 3))
    values[..., 2] = np.where(np.arange(500)[:, None] < 3, 0.08, 0.0)  # rare
    values[..., 3] = 4.0
    values[..., 4] = np.where(np.arange(3) == 1, rng.choice([0.0, 255.0], (500, 3)), 0.0)  # constant at two steps
    values[..., 5] = rng.choice([0.0, 0.5, 1.0], (500, 3))
    assert compute_statistics(values).two_valued == (1, 2, 4)
    assert compute_statistics(np.float32([[[0.3]], [[0.7]], [[0.3]]])).two_valued == (0,)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("mode", ["variance", "squash", "squash_hard"])
def test_a_constant_dimension_is_shifted_not_divided(mode, clamp):
    normalizer = Normalizer.from_statistics(compute_statistics(np.full((5, 1, 1), 3.0)), mode, percentile_clamp=clamp)
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


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), r"'action': 'mean' is not finite at index \(1, 0\)"),
        (float("inf"), r"'action': 'mean' is not finite"),
        ("far", "'action' are not rectangular lists of numbers.*far"),
        ([0.0], "'action' are not rectangular lists of numbers"),
    ],
)
def test_json_takes_finite_numbers_only(statistics, value, message):
    broken = to_json({"action": statistics})
    broken["action"]["mean"][1][0] = value
    with pytest.raises(ValueError, match=message):
        from_json(broken)


ROTATION = range(3, 9)  # of a pose vector


@pytest.fixture
def poses_of_bridge():
    """Statistics like Bridge's: positions that spread over centimetres far from zero, rotations, a gripper; one is constant."""
    rng = np.random.default_rng(5)
    centre = np.array([0.8, -0.3, 0.05, *np.zeros(6), 0.6])
    spread = np.array([0.05, 0.08, 0.03, *[0.5] * 6, 0.4])
    samples = {key: rng.normal(size=(600, horizon, 10)) * spread + centre for key, horizon in (("action", 15), ("proprio", 1))}
    samples["action"][:, 3, 9] = 0.7
    return {key: compute_statistics(value) for key, value in samples.items()}


@pytest.mark.parametrize("mode", ["identity", "variance", "squash", "squash_hard"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_raw_dimensions_stay_as_they_are_and_leave_the_others_alone(poses_of_bridge, mode, dtype):
    everything = Normalizer.from_statistics(poses_of_bridge["action"], mode, dtype=dtype)
    normalizer = Normalizer.from_statistics(poses_of_bridge["action"], mode, raw_dims=tuple(ROTATION), dtype=dtype)
    values = np.random.default_rng(6).normal(size=(7, 15, 10)).astype(np.float32) * 100
    others = [0, 1, 2, 9]
    for method in ("normalize", "unnormalize"):
        out = getattr(normalizer, method)(values)
        np.testing.assert_array_equal(out[..., ROTATION], values[..., ROTATION].astype(dtype))
        np.testing.assert_array_equal(out[..., others], getattr(everything, method)(values)[..., others])


@pytest.mark.parametrize("dims", [(2,), (-1,), (0, 7), (0.5,)])
def test_raw_dimensions_that_the_statistics_lack_are_refused(statistics, dims):
    with pytest.raises(ValueError, match=r"raw_dims of 'action' are \(.*\); expected dimensions of 0 to 1"):
        Normalizer.from_statistics(statistics, "variance", "action", raw_dims=dims)


def test_other_dtypes_are_refused(statistics):
    with pytest.raises(ValueError, match="normaliser of 'action' is float16; expected float32 or bfloat16"):
        Normalizer.from_statistics(statistics, "variance", "action", dtype=np.float16)


@pytest.mark.reference
def test_bfloat16_is_that_of_torch_bit_for_bit(poses_of_bridge):
    # Part by part as the published system has it: positions and gripper `variance`, rotations `identity` (SPEC 7.1).
    import torch

    torch.set_num_threads(1)

    def of(field, part):
        return torch.from_numpy(getattr(statistics, field)[..., part].copy())

    for key, statistics in poses_of_bridge.items():
        normalizer = Normalizer.from_statistics(statistics, "variance", key, tuple(ROTATION), ml_dtypes.bfloat16, True)
        raw = np.random.default_rng(7).normal(size=(500, *statistics.mean.shape)) * statistics.std * 2 + statistics.mean
        raw = raw.astype(np.float32)  # two deviations: some values are clamped
        raw[0, 0, 0] = statistics.mean_clamped[0, 0]
        ours, back = normalizer.normalize(raw), normalizer.unnormalize(raw)
        assert ours.dtype == back.dtype == np.float32
        for part in (slice(0, 3), slice(3, 9), slice(9, 10)):
            values = torch.from_numpy(raw[..., part].copy()).bfloat16()
            if part == slice(3, 9):
                expected, expected_back = values, values
            else:
                std = of("std_clamped", part)
                shift, scale = of("mean_clamped", part), 1 / torch.where(std < 1e-5, torch.ones_like(std), std)
                low, high = (((of(bound, part) - shift) * scale).bfloat16() for bound in ("clamp_min", "clamp_max"))
                shift, scale = shift.bfloat16(), scale.bfloat16()
                expected = torch.clamp((values - shift) * scale, low, high)
                expected_back = values / scale + shift
                assert (expected == low).any() and (expected == high).any() and (expected != low).any()
            for got, wanted in ((ours[..., part], expected), (back[..., part], expected_back)):
                assert wanted.dtype == torch.bfloat16
                np.testing.assert_array_equal(got.copy().view(np.uint32), wanted.float().numpy().view(np.uint32))


def test_bfloat16_quantises_positions_to_millimetres(poses_of_bridge):
    values = np.broadcast_to(poses_of_bridge["action"].mean, (2, 15, 10)).copy()
    values[0, :, 0], values[1, :, 0] = 0.800, 0.802  # between 0.5 and 1 m the grid is 1/256 m: both are 205/256
    coarse, fine = (
        Normalizer.from_statistics(poses_of_bridge["action"], "variance", dtype=dtype).normalize(values)[..., 0]
        for dtype in (ml_dtypes.bfloat16, np.float32)
    )
    assert not np.ptp(coarse, axis=0).any()
    np.testing.assert_allclose(np.ptp(fine, axis=0), 0.002 / poses_of_bridge["action"].std[:, 0], rtol=1e-3)


def published_file(robot: str, horizon: int) -> dict:
    """A statistics file by robot, computed part by part, as JSON has it."""
    rng = np.random.default_rng(8)
    parts = {
        key: (horizon if name == "action" else 1, width)
        for name, keys in PUBLISHED_STATISTICS[robot].items()
        for key, width in zip(keys, (3, 6, 1), strict=True)
    }
    entries = {key: compute_statistics(rng.normal(size=(50, *shape)) + len(key)) for key, shape in parts.items()}
    return json.loads(json.dumps(to_json(entries)))


@pytest.mark.parametrize("robot, horizon", [("bridge", 15), ("libero", 20)])
def test_published_statistics_are_joined_in_the_order_of_a_pose_vector(robot, horizon):
    published = published_file(robot, horizon)
    statistics = statistics_from_published(dict(reversed(published.items())))  # a file's order says nothing
    assert list(statistics) == ["action", "proprio"]
    assert statistics["action"].mean.shape == (horizon, 10) and statistics["proprio"].mean.shape == (1, 10)
    assert statistics["action"].percentiles.shape == (1001, horizon, 10)
    action, obs = ("action/gripper_action_lowdim", {"bridge": "obs/gripper_state_lowdim", "libero": "obs/gripper_lowdim"}[robot])
    position = {"bridge": "action/eef_pos_lowdim", "libero": "action/eef_pos_ref_delta_lowdim"}[robot]
    for field in (field.name for field in dataclasses.fields(Statistics)):
        values = getattr(statistics["action"], field)
        np.testing.assert_array_equal(values[..., :3], np.float32(published[position][field]))
        np.testing.assert_array_equal(values[..., 9:], np.float32(published[action][field]))
        proprio = getattr(statistics["proprio"], field)
        np.testing.assert_array_equal(proprio[..., 3:9], np.float32(published["obs/eef_rot_lowdim"][field]))
        np.testing.assert_array_equal(proprio[..., 9:], np.float32(published[obs][field]))
    assert statistics_to_published(statistics, robot) == published  # exactly, and so does the other way
    np.testing.assert_array_equal(statistics_from_published(published)["action"].std_clamped, statistics["action"].std_clamped)


def test_all_wrong_keys_of_published_statistics_are_listed():
    broken = published_file("libero", 2)
    del broken["obs/gripper_lowdim"], broken["obs/eef_pos_lowdim"]
    broken["obs/gripper_state_lowdim"] = broken["action/eef_speed"] = {}
    with pytest.raises(
        ValueError,
        match=r"of 'libero': missing keys \['obs/eef_pos_lowdim', 'obs/gripper_lowdim'\], "
        r"unknown keys \['action/eef_speed', 'obs/gripper_state_lowdim'\]",
    ):
        statistics_from_published(broken)
    with pytest.raises(ValueError, match=r"missing keys.*unknown keys \['action', 'proprio'\]"):
        statistics_from_published({"action": {}, "proprio": {}})


def test_all_contradictory_parts_of_published_statistics_are_listed():
    broken, longer = published_file("bridge", 2), published_file("bridge", 3)
    broken["action/eef_rot_lowdim"] = longer["action/eef_rot_lowdim"]
    broken["obs/gripper_state_lowdim"] = broken["obs/eef_pos_lowdim"]
    with pytest.raises(
        ValueError,
        match=r"'action/eef_rot_lowdim' has shape \(3, 6\), expected \(2, 6\); "
        r"'obs/gripper_state_lowdim' has shape \(1, 3\), expected \(1, 1\)",
    ):
        statistics_from_published(broken)


def test_what_has_no_published_form_is_refused(statistics, poses_of_bridge):
    with pytest.raises(ValueError, match=r"robot is 'franka'.*bridge or libero"):
        statistics_to_published(poses_of_bridge, "franka")
    with pytest.raises(ValueError, match=r"keys \['action'\]; expected 'action' and 'proprio'"):
        statistics_to_published({"action": poses_of_bridge["action"]}, "bridge")
    with pytest.raises(ValueError, match=r"'proprio' have shape \(3, 2\).*10\)"):
        statistics_to_published(poses_of_bridge | {"proprio": statistics}, "bridge")


@pytest.fixture(scope="module")
def rotations() -> Rotation:
    """Uniform ones, and turns by almost nothing and almost or exactly π about random axes and the coordinate axes."""
    rng = np.random.default_rng(9)
    axes = rng.normal(size=(60, 3))
    axes = np.concatenate([axes / np.linalg.norm(axes, axis=1, keepdims=True), np.eye(3)])
    angles = np.array([0.0, 1e-7, np.pi - 1e-3, np.pi - 1e-7, np.pi])
    turns = Rotation.from_rotvec((angles[:, None, None] * axes).reshape(-1, 3))
    return Rotation.concatenate([Rotation.random(500, rng=rng), turns])


def pose_vectors(rotations: Rotation, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    position, gripper = rng.uniform(-1, 1, size=(len(rotations), 3)), rng.uniform(size=(len(rotations), 1))
    return np.concatenate([position, rot6d_from_matrix(rotations.as_matrix()), gripper], axis=1).astype(np.float32)


def transforms(poses: np.ndarray) -> np.ndarray:
    """float64 4×4 matrices of pose vectors, orthonormalised by scipy and not by Gram–Schmidt."""
    rows = poses[..., 3:9].reshape(-1, 2, 3).astype(np.float64)
    matrices = np.zeros((len(rows), 4, 4))
    matrices[:, :3, :3] = Rotation.from_matrix(np.concatenate([rows, np.cross(rows[:, :1], rows[:, 1:])], axis=1)).as_matrix()
    matrices[:, :3, 3], matrices[:, 3, 3] = poses.reshape(-1, 10)[:, :3], 1
    return matrices.reshape(*poses.shape[:-1], 4, 4)


def test_rot6d_is_two_rows():
    turn = Rotation.from_quat([0, 0, np.sin(0.3), np.cos(0.3)])  # xyzw: 0.6 rad about z
    cos, sin = np.cos(0.6), np.sin(0.6)
    np.testing.assert_allclose(rot6d_from_matrix(turn.as_matrix()), [cos, -sin, 0, sin, cos, 0], atol=1e-7)
    np.testing.assert_allclose(rot6d_from_matrix(np.eye(3)), [1, 0, 0, 0, 1, 0])


def test_rot6d_round_trip_of_any_rotation(rotations):
    matrices = rotations.as_matrix()
    restored = matrix_from_rot6d(rot6d_from_matrix(matrices))
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, matrices, atol=2e-7)
    np.testing.assert_allclose((Rotation.from_matrix(restored).inv() * rotations).magnitude(), 0, atol=1e-6)


def test_gram_schmidt_agrees_with_the_published_formula():
    # Rows of any length and angle, in float64, with the published epsilon in both divisions.
    raw = np.random.default_rng(10).normal(size=(1000, 6)).astype(np.float32)
    a, b = raw[:, :3].astype(np.float64), raw[:, 3:].astype(np.float64)
    r1 = a / (np.linalg.norm(a, axis=1, keepdims=True) + 1e-9)
    b = b - np.einsum("ni,ni->n", r1, b)[:, None] * r1
    r2 = b / (np.linalg.norm(b, axis=1, keepdims=True) + 1e-9)
    got = matrix_from_rot6d(raw)
    np.testing.assert_allclose(got, np.stack([r1, r2, np.cross(r1, r2)], axis=1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(got), 1, atol=1e-6)
    np.testing.assert_allclose(matrix_from_rot6d(raw * [5, 5, 5, 0.1, 0.1, 0.1]), got, atol=2e-7)  # lengths do not matter
    np.testing.assert_allclose(matrix_from_rot6d(raw.reshape(10, 100, 6)), got.reshape(10, 100, 3, 3), atol=0)


def test_relative_poses_are_products_of_transforms(rotations):
    current, future = pose_vectors(rotations, 11), pose_vectors(rotations[::-1], 12)
    relative = relative_poses(current, future)
    assert relative.dtype == np.float32
    np.testing.assert_allclose(transforms(relative), np.linalg.inv(transforms(current)) @ transforms(future), atol=1e-6)
    np.testing.assert_array_equal(relative[:, 9], future[:, 9])
    absolute = absolute_poses(current, future)
    np.testing.assert_allclose(transforms(absolute), transforms(current) @ transforms(future), atol=1e-6)
    np.testing.assert_array_equal(absolute[:, 9], future[:, 9])


def test_relative_and_absolute_poses_invert_each_other(rotations):
    current, future = pose_vectors(rotations, 11), pose_vectors(rotations[::-1], 12)
    np.testing.assert_allclose(absolute_poses(current, relative_poses(current, future)), future, atol=1e-6)
    np.testing.assert_allclose(relative_poses(current, absolute_poses(current, future)), future, atol=1e-6)


def test_the_same_pose_is_the_identity_seen_from_itself(rotations):
    poses = pose_vectors(rotations, 11)
    np.testing.assert_allclose(relative_poses(poses, poses)[:, :9], [[0, 0, 0, 1, 0, 0, 0, 1, 0]] * len(poses), atol=1e-7)


def test_a_relative_pose_by_hand():
    # The hand is at (1, 2, 3), turned a quarter about z: its x axis is the base's y.
    current = np.array([1, 2, 3, *[0, -1, 0, 1, 0, 0], 0.25])
    ahead = np.array([1, 2.5, 3, *[0, -1, 0, 1, 0, 0], 0.75])
    np.testing.assert_allclose(relative_poses(current, ahead), [0.5, 0, 0, 1, 0, 0, 0, 1, 0, 0.75], atol=1e-7)


def test_poses_broadcast_over_a_chunk(rotations):
    current, future = pose_vectors(rotations[:4], 13), pose_vectors(rotations[:60], 14).reshape(4, 15, 10)
    for convert in (relative_poses, absolute_poses):
        chunk = convert(current[:, None], future)
        assert chunk.shape == (4, 15, 10)
        np.testing.assert_array_equal(chunk[2, 7], convert(current[2], future[2, 7]))
        assert convert(future, current[:, None]).shape == (4, 15, 10)
        assert convert(current[0], future[:0]).shape == (0, 15, 10)


@pytest.mark.parametrize(
    "rot6d, message",
    [
        ([0, 0, 0, 0, 1, 0], r"degenerate rotation at index \(\): \[0.0, 0.0, 0.0, 0.0, 1.0, 0.0\]"),
        ([1, 0, 0, 0, 0, 0], "degenerate"),
        ([0.1, 0.2, 0.3, 0.3, 0.6, 0.9], "degenerate"),  # parallel, up to float32
        ([[1, 0, 0, 0, 1, 0], [1, 2, 3, -1, -2, -3]], r"index \(1,\)"),
        ([1, 0, 0, np.nan, 1, 0], r"'rot6d' is not finite at index \(3,\)"),
        ([1, 0, 0, 0, 1], r"'rot6d' has shape \(5,\); expected \(..., 6\)"),
    ],
)
def test_what_is_no_6d_rotation_is_refused(rot6d, message):
    with pytest.raises(ValueError, match=message):
        matrix_from_rot6d(np.array(rot6d, np.float32))


@pytest.mark.parametrize(
    "matrices, message",
    [
        (np.eye(4), r"'rotations' has shape \(4, 4\); expected \(..., 3, 3\)"),
        (np.full((3, 3), np.inf), r"'rotations' is not finite at index \(0, 0\)"),
        (np.stack([np.eye(3), np.diag([1, 1, -1])]), r"'rotations' has no rotation matrix at index \(1,\)"),  # left-handed
        (2 * np.eye(3), "no rotation matrix"),
    ],
)
def test_what_is_no_rotation_matrix_is_refused(matrices, message):
    with pytest.raises(ValueError, match=message):
        rot6d_from_matrix(matrices)


def test_pose_errors_name_the_argument():
    pose = np.array([0, 0, 0, 1, 0, 0, 0, 1, 0, 1.0])
    with pytest.raises(ValueError, match=r"'current' has shape \(9,\); expected \(..., 10\)"):
        relative_poses(pose[:9], pose)
    with pytest.raises(ValueError, match=r"'future' is not finite at index \(1, 9\)"):
        relative_poses(pose, np.stack([pose, [*pose[:9], np.nan]]))
    with pytest.raises(ValueError, match="'relative' has a degenerate rotation"):
        absolute_poses(pose, np.zeros(10))
    with pytest.raises(ValueError, match=r"'current' \(2, 10\) and 'relative' \(3, 10\) do not broadcast"):
        absolute_poses(np.stack([pose] * 2), np.stack([pose] * 3))


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
