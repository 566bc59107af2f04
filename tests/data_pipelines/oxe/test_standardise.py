"""Values here are worked out by hand: a quarter turn about z has the rows (0, −1, 0) and (1, 0, 0)."""

import numpy as np
import pytest

from data_pipelines.oxe import standardise as s

HALF = np.sqrt(0.5)
TURN = [0, -1, 0, 1, 0, 0]  # rot6d rows of a quarter turn about z


def steps(*values):
    return np.array(values, float)


@pytest.mark.parametrize(
    "encoding, values",
    [
        ("euler_xyz", [0, 0, np.pi / 2]),
        ("ypr", [np.pi / 2, 0, 0]),
        ("euler_zxy", [np.pi / 2, 0, 0]),
        ("yaw", [np.pi / 2]),
        ("rotvec", [0, 0, np.pi / 2]),
        ("quat_xyzw", [0, 0, HALF, HALF]),
        ("quat_wxyz", [3 * HALF, 0, 0, 3 * HALF]),
    ],
)
def test_a_quarter_turn_in_every_encoding(encoding, values):
    np.testing.assert_allclose(s.rot6d(np.array([values]), encoding), [TURN], atol=1e-6)


def test_axes_of_euler_angles_are_fixed():
    # First a quarter turn about x, then one about the fixed z: x → y, y → z, z → x.
    np.testing.assert_allclose(s.rot6d(np.array([[np.pi / 2, 0, np.pi / 2]]), "euler_xyz"), [[0, 0, 1, 1, 0, 0]], atol=1e-6)
    # About z first, then about the fixed x: x → z, y → −x, z → −y.
    np.testing.assert_allclose(s.rot6d(np.array([[np.pi / 2, np.pi / 2, 0]]), "euler_zxy"), [[0, -1, 0, 0, 0, -1]], atol=1e-6)


def test_rotations_that_are_none():
    with pytest.raises(ValueError, match="step 1 is zero"):
        s.rot6d(np.array([[0, 0, 0, 1.0], [0, 0, 0, 0]]), "quat_xyzw")
    with pytest.raises(ValueError, match=r"shape \(1, 4\); expected \(n, 3\)"):
        s.rot6d(np.zeros((1, 4)), "rotvec")
    with pytest.raises(ValueError, match="'euler'; expected one of euler_xyz"):
        s.rot6d(np.zeros((1, 3)), "euler")


@pytest.mark.parametrize("order", ["C", "F"])
def test_homogeneous_matrices_in_either_order(order):
    matrix = np.array([[0, -1, 0, 0.1], [1, 0, 0, 0.2], [0, 0, 1, 0.3], [0, 0, 0, 1]])
    flat = np.stack([matrix.ravel(order), matrix.ravel(order)])
    position, rotation = s.split_transforms(flat)
    np.testing.assert_array_equal(position, [[0.1, 0.2, 0.3]] * 2)
    np.testing.assert_array_equal(rotation[1], matrix[:3, :3])
    flat[1, 15] = 0
    with pytest.raises(ValueError, match="step 1 is no homogeneous matrix"):
        s.split_transforms(flat)


def test_opening():
    np.testing.assert_allclose(s.opening(steps(0, 0.02, 0.08, 0.1), closed=0, open=0.08), [0, 0.25, 1, 1])
    np.testing.assert_allclose(s.opening(steps(0, 0.25, 1), closed=1, open=0), [1, 0.75, 0])
    np.testing.assert_allclose(s.opening(steps(-1, 0, 1), closed=1, open=-1), [1, 0.5, 0])
    with pytest.raises(ValueError, match="both closed and open"):
        s.opening(steps(0), closed=1, open=1)


def test_binarise_holds_between_the_thresholds():
    np.testing.assert_array_equal(s.binarise(steps(0.5, 0.9, 0.5, 0.3, 0.2, 0.5, 0.7, 0.75)), [1, 1, 1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(s.binarise(steps(0.5, 0.1)), [0, 0])
    np.testing.assert_array_equal(s.binarise(steps(0.5, 0.6)), [1, 1])
    with pytest.raises(ValueError, match=r"low=0\.8, high=0\.2"):
        s.binarise(steps(0.0), low=0.8, high=0.2)


def test_relative_commands_carry_forward():
    np.testing.assert_array_equal(s.accumulate(steps(0, 1, 0, 0.05, -1, 0)), [1, 0, 0, 0, 1, 1])  # closes first: was open
    np.testing.assert_array_equal(s.accumulate(steps(0, -1, 0, 1)), [0, 1, 1, 0])  # opens first: was closed
    np.testing.assert_array_equal(s.accumulate(steps(0, 0.1, -0.1)), [1, 1, 1])  # nothing beyond the threshold


def test_the_side_that_closes():
    commands = {"steps/g": np.array([0.0, 1, 0, -1])}
    closing = s.Gripper("g", closed=1, open=-1, relative=0.1)(commands)
    opening = s.Gripper("g", closed=-1, open=1, relative=0.1)(commands)
    np.testing.assert_array_equal(closing[:, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(opening[:, 0], [0, 1, 1, 0])


def test_binary_gripper():
    gripper = s.Gripper("g", closed=-1, open=1, binary=True)
    np.testing.assert_array_equal(gripper({"steps/g": np.array([1, 0.1, -0.9, 0.1])})[:, 0], [1, 1, 0, 0])


def test_last_command():
    part = s.LastCommand(s.Gripper("action[3:4]"), ("action[0:3]",))
    rows = np.array([[1, 0, 0, 0.9], [1, 0, 0, 0.8], [1, 0, 0, 0.7]])
    np.testing.assert_allclose(part({"steps/action": rows})[:, 0], [0.9, 0.9, 0.8])
    rows[0] = 0  # a placeholder: its gripper is no command
    np.testing.assert_allclose(part({"steps/action": rows})[:, 0], [0.8, 0.8, 0.8])
    np.testing.assert_allclose(part({"steps/action": rows[:1]})[:, 0], [0])


def test_values_scale_and_add():
    columns = {"steps/a": np.array([[1.0, 2]]), "steps/b": np.array([[10.0, 20]])}
    np.testing.assert_array_equal(s.Values("a[0:2]", scale=0.5, plus="b[0:2]")(columns), [[10.5, 21]])


def test_a_tool_turns_on_the_right():
    columns = {"steps/r": np.array([[0, 0, np.pi / 2]])}
    tool = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0))
    # Rz·tool: rows of Rz are (0, −1, 0), (1, 0, 0); times the tool's columns.
    np.testing.assert_allclose(s.Turn("r[0:3]", "euler_xyz", tool=tool)(columns), [[0, -1, 0, 0, 0, 1]], atol=1e-6)


def test_read_names_feature_and_step():
    columns = {"steps/a": np.array([[1.0, 2], [3, np.nan]]), "steps/flag": np.array([True, False])}
    np.testing.assert_array_equal(s.read(columns, "flag"), [[1], [0]])
    np.testing.assert_array_equal(s.read(columns, "a[0:1]"), [[1], [3]])  # what is not read may be NaN
    with pytest.raises(ValueError, match="'steps/a' is not finite at step 1, dimension 1"):
        s.read(columns, "a[0:2]")
    with pytest.raises(ValueError, match=r"'steps/a' has 2 dimensions; 'a\[1:4\]' needs 4"):
        s.read(columns, "a[1:4]")
    with pytest.raises(ValueError, match="'steps/b' is missing; there are 'steps/a', 'steps/flag'"):
        s.read(columns, "b")


def test_features_of_several_axes_are_flat():
    assert s.read({"steps/m": np.arange(8).reshape(1, 2, 4)}, "m[4:6]").tolist() == [[4, 5]]


@pytest.mark.parametrize("reference", ["a[3:3]", "a[2:1]", "a[1]", "", "a[0:2"])
def test_references_of_another_form(reference):
    with pytest.raises(ValueError, match="expected 'path' or"):
        s.parse(reference)


def test_layouts_declare_what_they_are():
    layout = s.pose(s.Values("a[0:3]"), s.Turn("a[3:6]", "rotvec"), s.NO_GRIPPER)
    assert (layout.width, layout.rotation_dims, len(layout.dimensions)) == (10, (3, 4, 5, 6, 7, 8), 10)
    assert layout.dimensions[1] == "position 1 [m]" and layout.dimensions[9] == "gripper [not recorded: 1]"
    slide = s.Values("a[4:5]", "slide", s.METRES)
    joints = s.vector(s.joints("a[0:2]"), s.Values("a[2:4]"), slide, s.joints("a[5:6]", unit="degrees"))
    assert joints.dimensions == (
        *("joints 0 [rad]", "joints 1 [rad]", "value 0 [dataset units]", "value 1 [dataset units]"),
        *("slide [m]", "joints [degrees]"),
    )
    with pytest.raises(ValueError, match=r"widths \[3, 1\]; expected position 3, rotation 6, gripper 1"):
        s.delta(s.Values("a[0:3]"), s.NO_GRIPPER)
    with pytest.raises(ValueError, match=r"widths \[1, 3, 6\]"):
        s.pose(s.NO_GRIPPER, s.Values("a[0:3]"), s.NO_TURN)
    with pytest.raises(ValueError, match="kind is 'joint'"):
        s.Layout("joint", (s.NO_GRIPPER,))
