"""Open X-Embodiment and newer datasets, one plain-data entry each, and the place where a user's own robot is registered.

Sources of the facts, in this order. Keys, shapes and meanings: the features.json of each dataset with its documentation in the
TensorFlow Datasets catalogue. Rates: the control frequencies of the Open X-Embodiment overview, as Octo, RDT and LeRobot have
them. Gripper conventions and encodings that the catalogue does not state: the conversions of Octo, OpenVLA, OpenX (Hejna) and
RDT where they agree; where one of them leaves a raw gripper value as it is, that is not taken as a claim. What could not be
established, or is contested, is None, which leaves stage 1, and said in `notes`.

Deltas are in metres and radians unless their unit says otherwise: datasets scale and clip their commands in ways that few of
them document. Their frame is the one that a dataset commands in, the robot's base as far as it is documented; where it is the
hand's, the name of the part says so.
"""

import dataclasses
import difflib

from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import (
    METRES,
    NATIVE,
    NO_GRIPPER,
    NO_TURN,
    RADIANS,
    RAW,
    Constant,
    Gripper,
    LastCommand,
    Layout,
    Transform,
    Turn,
    Values,
    delta,
    joints,
    pose,
    vector,
)

# The Euler angles of BridgeData V2 belong to the hand's frame turned by this matrix's inverse (SPEC 8.6).
WIDOWX_TOOL = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0))

_RTX_LANGUAGE = "observation/natural_language_instruction"  # of datasets that the RT-X team converted itself


def step(column: str, unit: str = METRES, scale: float = 1.0) -> Values:
    """A commanded change of position."""
    return Values(column, "Δposition", unit, scale)


def rtx_delta(gripper, unit: str = RAW) -> Layout:
    """World vector and roll-pitch-yaw change, as the RT-X team names them."""
    return delta(step("action/world_vector[0:3]", unit), Turn("action/rotation_delta[0:3]", "euler_xyz"), gripper)


def flat_delta(gripper, encoding="euler_xyz", unit: str = RAW) -> Layout:
    """One action vector [Δposition 3 | Δrotation 3 | ...]."""
    return delta(step("action[0:3]", unit), Turn("action[3:6]", encoding), gripper)


_RTX_ACTION = {"action/world_vector": (3,), "action/rotation_delta": (3,)}
_CLOSEDNESS = "action/gripper_closedness_action"
_CHANGE = Gripper(_CLOSEDNESS, closed=1.0, open=-1.0, relative=0.1)


def _google(name: str, pose_path: str, control_hz: float, notes: str = "") -> DatasetSpec:
    return DatasetSpec(
        name,
        primary="image",
        language=_RTX_LANGUAGE,
        control_hz=control_hz,
        features=_RTX_ACTION | {_CLOSEDNESS: (1,), pose_path: (7,), "observation/gripper_closed": (1,)},
        proprio=pose(
            Values(f"{pose_path}[0:3]"),
            Turn(f"{pose_path}[3:7]", "quat_xyzw"),
            Gripper("observation/gripper_closed", closed=1.0, open=0.0),
        ),
        actions=rtx_delta(_CHANGE, METRES),
        notes=notes,
    )


def _bridge(
    name: str,
    primary: str,
    secondary: str | None,
    language: str,
    gripper: Gripper,
    action: dict[str, tuple[int, ...]],
    notes: str = "",
) -> DatasetSpec:
    """BridgeData V2: actions are the poses that were reached, each with the gripper command that led there (SPEC 8.5)."""
    reached = (Values("observation/state[0:3]"), Turn("observation/state[3:6]", "euler_xyz", tool=WIDOWX_TOOL))
    motion = tuple(f"{path}[0:{min(shape[0], 6)}]" for path, shape in action.items() if shape)
    return DatasetSpec(
        name,
        primary=primary,
        secondary=secondary,
        language=language,
        control_hz=5.0,
        features=action | {"observation/state": (7,)},
        proprio=pose(*reached, Gripper("observation/state[6:7]")),
        actions=pose(*reached, LastCommand(gripper, motion)),
        notes=f"{notes}The first step of an episode idles: its action is zero.",
    )


_BRIDGE_V2 = _bridge("bridge_orig", "image_0", "image_1", "language_instruction", Gripper("action[6:7]"), {"action": (7,)})

# UT Austin's robots: Franka arms under robosuite's operational space controller, which reads a rotation vector.
_AUSTIN_ACTION = flat_delta(Gripper("action[6:7]", closed=1.0, open=0.0), "rotvec", NATIVE)


def _austin(name: str, state: str, size: int, width: float) -> DatasetSpec:
    """State: [joints 7 | gripper width | homogeneous matrix 16]."""
    return DatasetSpec(
        name,
        primary="image",
        wrist="wrist_image",
        control_hz=20.0,
        features={"action": (7,), state: (size,)},
        proprio=pose(Transform(f"{state}[8:24]"), Gripper(f"{state}[7:8]", closed=0.0, open=width)),
        actions=_AUSTIN_ACTION,
    )


def _austin_split(name: str) -> DatasetSpec:
    """The same with the matrix and the gripper width as features of their own."""
    return DatasetSpec(
        name,
        primary="image",
        wrist="wrist_image",
        control_hz=20.0,
        features={"action": (7,), "observation/state_ee": (16,), "observation/state_gripper": (1,)},
        proprio=pose(Transform("observation/state_ee[0:16]"), Gripper("observation/state_gripper", closed=0.0, open=0.077)),
        actions=_AUSTIN_ACTION,
    )


def _pr2(name: str) -> DatasetSpec:
    """Positions and gripper widths in millimetres."""
    return DatasetSpec(
        name,
        primary="image",
        control_hz=10.0,
        features={"action": (8,), "observation/state": (7,)},
        proprio=pose(
            Values("observation/state[0:3]", scale=0.001),
            Turn("observation/state[3:6]", "euler_xyz"),
            Gripper("observation/state[6:7]", closed=0.0, open=86.7),
        ),
        actions=delta(
            step("action[0:3]", METRES, 0.001), Turn("action[3:6]", "euler_xyz"), Gripper("action[6:7]", closed=1.0, open=0.0)
        ),
    )


def _dlr(name: str, state: int, gripper, control_hz: float, notes: str = "") -> DatasetSpec:
    """Euler angles about z, x, y; the seventh action closes the gripper."""
    return DatasetSpec(
        name,
        primary="image",
        control_hz=control_hz,
        features={"action": (7,), "observation/state": (state,)},
        proprio=pose(Values("observation/state[0:3]"), Turn("observation/state[3:6]", "euler_zxy"), gripper),
        actions=flat_delta(Gripper("action[6:7]", closed=1.0, open=0.0), "euler_zxy"),
        notes=notes,
    )


def _gnm(name: str, control_hz: float) -> DatasetSpec:
    """Mobile robots: waypoints."""
    return DatasetSpec(
        name,
        primary="image",
        control_hz=control_hz,
        features={"action_angle": (3,), "observation/state": (3,)},
        proprio=vector(Values("observation/state[0:2]", "position", RAW), Values("observation/state[2:3]", "yaw", RADIANS)),
        actions=vector(Values("action_angle[0:2]", "waypoint", RAW), Values("action_angle[2:3]", "Δyaw", RADIANS)),
    )


def _aloha(name: str, secondary: str | None, base: bool) -> DatasetSpec:
    def arms(column: str) -> tuple:
        return (
            joints(f"{column}[0:6]", "left joints"),
            Gripper(f"{column}[6:7]", name="left gripper"),
            joints(f"{column}[7:13]", "right joints"),
            Gripper(f"{column}[13:14]", name="right gripper"),
        )

    wheels = (Values("action[14:16]", "linear and angular base velocity", "m/s, rad/s"),) if base else ()
    return DatasetSpec(
        name,
        primary="cam_high",
        secondary=secondary,
        wrist="cam_right_wrist",
        control_hz=50.0,
        features={"action": (16 if base else 14,), "observation/state": (14,)},
        proprio=vector(*arms("observation/state")),
        actions=vector(*arms("action"), *wheels),
        notes="Actions are joint targets.",
    )


def _libero(suite: str) -> DatasetSpec:
    """LIBERO, regenerated by OpenVLA at 256×256 without idle steps; the published system reads its actions raw (SPEC 8.5)."""
    return DatasetSpec(
        f"libero_{suite}_no_noops",
        primary="image",
        wrist="wrist_image",
        control_hz=20.0,
        features={"action": (7,), "observation/state": (8,)},
        proprio=pose(
            Values("observation/state[0:3]"),
            Turn("observation/state[3:6]", "rotvec"),
            Gripper("observation/state[6:7]", closed=0.0, open=0.04),
        ),  # of the first finger, in metres
        actions=flat_delta(Gripper("action[6:7]", closed=1.0, open=-1.0), "rotvec", NATIVE),
        notes="The controller scales ±1 to 0.05 m and 0.5 rad; rotations here are of the raw vector in radians, as published.",
    )


def _mvp(name: str, control_hz: float) -> DatasetSpec:
    return DatasetSpec(
        name,
        primary="hand_image",
        control_hz=control_hz,
        features={"action": (8,), "observation/joint_pos": (7,), "observation/gripper": ()},
        proprio=vector(joints("observation/joint_pos[0:7]"), Gripper("observation/gripper", closed=1.0, open=0.0)),
        actions=vector(joints("action[0:7]", "Δjoints"), Gripper("action[7:8]", closed=1.0, open=0.0)),
    )


def _roboset(name: str) -> DatasetSpec:
    return DatasetSpec(
        name,
        primary="image_left",
        secondary="image_right",
        wrist="image_wrist",
        control_hz=5.0,
        features={"action": (8,), "observation/state": (8,)},
        proprio=vector(joints("observation/state[0:7]"), Values("observation/state[7:8]", "gripper joint", RAW)),
        actions=vector(joints("action[0:7]"), Gripper("action[7:8]", closed=1.0, open=0.0)),
        notes="Whether joint actions are targets or changes is not documented.",
    )


def _fmb(name: str) -> DatasetSpec:
    return DatasetSpec(
        name,
        primary="image_side_1",
        secondary="image_side_2",
        wrist="image_wrist_1",
        control_hz=10.0,
        features={"action": (7,), "observation/eef_pose": (7,), "observation/state_gripper_pose": ()},
        proprio=pose(
            Values("observation/eef_pose[0:3]"),
            Turn("observation/eef_pose[3:7]", "quat_xyzw"),
            Gripper("observation/state_gripper_pose", closed=1.0, open=0.0),
        ),
        actions=flat_delta(Gripper("action[6:7]"), unit=NATIVE),
    )


def _droid(name: str) -> DatasetSpec:
    """Actions are the commanded absolute poses, from `action_dict`: the velocities there are clipped and normalised."""
    return DatasetSpec(
        name,
        primary="exterior_image_1_left",
        secondary="exterior_image_2_left",
        wrist="wrist_image_left",
        control_hz=15.0,
        features={
            "action_dict/cartesian_position": (6,),
            "action_dict/gripper_position": (1,),
            "observation/cartesian_position": (6,),
            "observation/gripper_position": (1,),
        },
        proprio=pose(
            Values("observation/cartesian_position[0:3]"),
            Turn("observation/cartesian_position[3:6]", "euler_xyz"),
            Gripper("observation/gripper_position", closed=1.0, open=0.0),
        ),
        actions=pose(
            Values("action_dict/cartesian_position[0:3]"),
            Turn("action_dict/cartesian_position[3:6]", "euler_xyz"),
            Gripper("action_dict/gripper_position", closed=1.0, open=0.0),
        ),
        notes="Instructions are empty in many episodes; language_instruction_2 and _3 are further ones.",
    )


_DATASETS = (
    # RT-X, converted by the RT-X team.
    _google("fractal20220817_data", "observation/base_pose_tool_reached", 3.0),
    _google(
        "kuka",
        "observation/clip_function_input/base_pose_tool_reached",
        10.0,
        "The pose and the gripper are stored with zlib, which tfds decodes; instructions are the same for most episodes.",
    ),
    _bridge(
        "bridge",
        "image",
        None,
        _RTX_LANGUAGE,
        Gripper("action/open_gripper"),
        _RTX_ACTION | {"action/open_gripper": ()},
        "The older copy of the Open X-Embodiment bucket. ",
    ),
    _BRIDGE_V2,
    dataclasses.replace(_BRIDGE_V2, name="bridge_dataset"),
    DatasetSpec(
        "taco_play",
        primary="rgb_static",
        wrist="rgb_gripper",
        language=_RTX_LANGUAGE,
        control_hz=15.0,
        features={"action/rel_actions_world": (7,), "observation/robot_obs": (15,)},
        proprio=pose(
            Values("observation/robot_obs[0:3]"),
            Turn("observation/robot_obs[3:6]", "euler_xyz"),
            Gripper("observation/robot_obs[6:7]", closed=0.0, open=0.0807),
        ),
        actions=delta(
            step("action/rel_actions_world[0:3]", NATIVE),
            Turn("action/rel_actions_world[3:6]", "euler_xyz"),
            Gripper("action/rel_actions_world[6:7]", closed=-1.0, open=1.0),
        ),
        notes="The catalogue calls −1 open; Octo, OpenX and CALVIN, whose code recorded it, call 1 open, and so does this entry.",
    ),
    DatasetSpec(
        "jaco_play",
        primary="image",
        wrist="image_wrist",
        language=_RTX_LANGUAGE,
        control_hz=10.0,
        features={"action/world_vector": (3,), _CLOSEDNESS: (1,), "observation/joint_pos": (8,)},
        proprio=vector(joints("observation/joint_pos[0:6]"), Values("observation/joint_pos[6:8]", "fingers", RAW)),
        actions=delta(step("action/world_vector[0:3]", RAW), NO_TURN, _CHANGE),
        notes="end_effector_cartesian_pos is left out: sources disagree whether its rotation is a quaternion.",
    ),
    DatasetSpec(
        "berkeley_cable_routing",
        primary="image",
        secondary="top_image",
        wrist="wrist45_image",
        language=_RTX_LANGUAGE,
        control_hz=10.0,
        features=_RTX_ACTION | {"observation/robot_state": (7,)},
        proprio=vector(Values("observation/robot_state[0:7]", "robot state", RAW)),
        actions=delta(step("action/world_vector[0:3]", RAW), Turn("action/rotation_delta[0:3]", "rotvec"), NO_GRIPPER),
        notes="Actions are velocities; the gripper holds the cable. Sources disagree whether robot_state is a pose or joints.",
    ),
    DatasetSpec(
        "roboturk",
        primary="front_rgb",
        language=_RTX_LANGUAGE,
        control_hz=10.0,
        features=_RTX_ACTION | {_CLOSEDNESS: (1,)},
        actions=rtx_delta(Gripper(_CLOSEDNESS, closed=1.0, open=0.0)),
    ),
    DatasetSpec(
        "nyu_door_opening_surprising_effectiveness",
        primary="image",
        language=_RTX_LANGUAGE,
        control_hz=3.0,
        features=_RTX_ACTION | {_CLOSEDNESS: (1,)},
        actions=delta(step("action/world_vector[0:3]", RAW), Turn("action/rotation_delta[0:3]", "rotvec"), _CHANGE),
        notes="The only camera is at the wrist. Actions are velocities.",
    ),
    DatasetSpec(
        "viola",
        primary="agentview_rgb",
        wrist="eye_in_hand_rgb",
        language=_RTX_LANGUAGE,
        control_hz=20.0,
        features=_RTX_ACTION | {_CLOSEDNESS: (), "observation/ee_states": (16,), "observation/gripper_states": (1,)},
        proprio=pose(Transform("observation/ee_states[0:16]"), Gripper("observation/gripper_states", closed=0.0, open=0.0775)),
        actions=delta(
            step("action/world_vector[0:3]", NATIVE),
            Turn("action/rotation_delta[0:3]", "rotvec"),
            Gripper(_CLOSEDNESS, closed=1.0, open=0.0),
        ),
    ),
    DatasetSpec(
        "berkeley_autolab_ur5",
        primary="image",
        wrist="hand_image",
        language=_RTX_LANGUAGE,
        control_hz=5.0,
        features=_RTX_ACTION | {_CLOSEDNESS: (), "observation/robot_state": (15,)},
        proprio=pose(
            Values("observation/robot_state[6:9]"),
            Turn("observation/robot_state[9:13]", "quat_xyzw"),
            Gripper("observation/robot_state[13:14]", closed=1.0, open=0.0),
        ),
        actions=rtx_delta(_CHANGE, METRES),
    ),
    DatasetSpec(
        "toto",
        primary="image",
        language=_RTX_LANGUAGE,
        control_hz=30.0,
        features=_RTX_ACTION | {"action/open_gripper": (), "observation/state": (7,)},
        proprio=vector(joints("observation/state[0:7]")),
        actions=rtx_delta(Gripper("action/open_gripper")),
    ),
    DatasetSpec(
        "language_table",
        primary="rgb",
        language="observation/instruction",
        control_hz=10.0,
        features={"action": (2,), "observation/effector_translation": (2,)},
        proprio=vector(Values("observation/effector_translation[0:2]", "position in the plane", METRES)),
        actions=delta(step("action[0:2]"), Constant((0.0,), "Δheight"), NO_TURN, NO_GRIPPER),
        notes="Instructions are bytes of UTF-8 as integers, padded with zeros. The tool is a fixed peg.",
    ),
    DatasetSpec(
        "columbia_cairlab_pusht_real",
        primary="image",
        wrist="wrist_image",
        language=_RTX_LANGUAGE,
        control_hz=10.0,
        features=_RTX_ACTION | {"observation/robot_state": (2,)},
        proprio=vector(Values("observation/robot_state[0:2]", "position in the plane", METRES)),
        actions=rtx_delta(NO_GRIPPER, METRES),
        notes="The tool is a fixed peg.",
    ),
    # Converted by their authors.
    DatasetSpec(
        "stanford_kuka_multimodal_dataset_converted_externally_to_rlds",
        primary="image",
        control_hz=20.0,
        features={"action": (4,), "observation/ee_position": (3,), "observation/ee_orientation": (4,)},
        proprio=pose(Values("observation/ee_position[0:3]"), Turn("observation/ee_orientation[0:4]", "quat_xyzw"), NO_GRIPPER),
        actions=delta(step("action[0:3]", RAW), NO_TURN, NO_GRIPPER),
        notes="The peg is held all the time.",
    ),
    DatasetSpec(
        "nyu_rot_dataset_converted_externally_to_rlds",
        primary="image",
        control_hz=3.0,
        features={"action": (7,), "observation/state": (7,)},
        proprio=pose(
            Values("observation/state[0:3]", unit=RAW),
            Turn("observation/state[3:6]", "euler_xyz"),
            Gripper("observation/state[6:7]", closed=1.0, open=0.0),
        ),
        actions=flat_delta(Gripper("action[6:7]", closed=1.0, open=0.0)),
    ),
    DatasetSpec(
        "stanford_hydra_dataset_converted_externally_to_rlds",
        primary="image",
        wrist="wrist_image",
        control_hz=10.0,
        features={"action": (7,), "observation/state": (27,)},
        proprio=pose(
            Values("observation/state[0:3]"),
            Turn("observation/state[7:10]", "euler_xyz"),
            Gripper("observation/state[24:25]", closed=0.0, open=0.081),
        ),
        actions=flat_delta(Gripper("action[6:7]", closed=1.0, open=0.0)),
    ),
    _austin("austin_buds_dataset_converted_externally_to_rlds", "observation/state", 24, 0.08),
    _austin("utaustin_mutex", "observation/state", 24, 0.0757),
    _austin_split("austin_sailor_dataset_converted_externally_to_rlds"),
    _austin_split("austin_sirius_dataset_converted_externally_to_rlds"),
    DatasetSpec(
        "nyu_franka_play_dataset_converted_externally_to_rlds",
        primary="image",
        secondary="image_additional_view",
        control_hz=3.0,
        features={"action": (15,), "observation/state": (13,)},
        proprio=pose(Values("observation/state[7:10]"), Turn("observation/state[10:13]", "euler_xyz"), NO_GRIPPER),
        actions=delta(
            step("action[7:10]", RAW), Turn("action[10:13]", "euler_xyz"), Gripper("action[13:14]", closed=-1.0, open=1.0)
        ),
    ),
    DatasetSpec(
        "maniskill_dataset_converted_externally_to_rlds",
        primary="image",
        wrist="wrist_image",
        control_hz=20.0,
        features={"action": (7,), "observation/tcp_pose": (7,), "observation/state": (18,)},
        proprio=pose(
            Values("observation/tcp_pose[0:3]"),
            Turn("observation/tcp_pose[3:7]", "quat_wxyz"),
            Gripper("observation/state[7:8]", closed=0.0, open=0.04),
        ),
        actions=delta(
            step("action[0:3]", METRES, 0.1),
            Turn("action[3:6]", "rotvec", scale=0.1),
            Gripper("action[6:7]", closed=-1.0, open=1.0),
        ),
        notes="Simulation. Poses are in the world frame.",
    ),
    DatasetSpec(
        "furniture_bench_dataset_converted_externally_to_rlds",
        primary="image",
        wrist="wrist_image",
        control_hz=10.0,
        features={"action": (8,), "observation/state": (35,)},
        proprio=pose(
            Values("observation/state[0:3]"),
            Turn("observation/state[3:7]", "quat_xyzw"),
            Gripper("observation/state[34:35]", closed=0.0, open=0.08),
        ),
        actions=delta(step("action[0:3]"), Turn("action[3:7]", "quat_xyzw"), Gripper("action[7:8]", closed=1.0, open=-1.0)),
    ),
    DatasetSpec(
        "cmu_franka_exploration_dataset_converted_externally_to_rlds",
        primary="highres_image",
        control_hz=10.0,
        features={"action": (8,)},
        actions=flat_delta(Gripper("action[6:7]")),
    ),
    DatasetSpec(
        "ucsd_kitchen_dataset_converted_externally_to_rlds",
        primary="image",
        control_hz=2.0,
        features={"observation/state": (21,)},
        proprio=vector(joints("observation/state[0:7]")),
        notes="Actions are left out: their frame, unit and gripper convention are contested.",
    ),
    DatasetSpec(
        "ucsd_pick_and_place_dataset_converted_externally_to_rlds",
        primary="image",
        control_hz=3.0,
        features={"action": (4,), "observation/state": (7,)},
        proprio=pose(
            Values("observation/state[0:3]", scale=0.1),
            Turn("observation/state[3:6]", "euler_xyz"),
            Gripper("observation/state[6:7]", closed=0.0, open=6.03),
        ),
        actions=delta(step("action[0:3]", RAW), NO_TURN, Gripper("observation/state[6:7]", closed=0.0, open=6.03)),
        notes="Actions are velocities; their gripper is the measured opening, since the command is a torque. Decimetres.",
    ),
    DatasetSpec(
        "bc_z",
        primary="image",
        language=_RTX_LANGUAGE,
        control_hz=10.0,
        features={
            "action/future/xyz_residual": (30,),
            "action/future/axis_angle_residual": (30,),
            "action/future/target_close": (10,),
            "observation/present/xyz": (3,),
            "observation/present/axis_angle": (3,),
            "observation/present/sensed_close": (1,),
        },
        proprio=pose(
            Values("observation/present/xyz[0:3]"),
            Turn("observation/present/axis_angle[0:3]", "rotvec"),
            Gripper("observation/present/sensed_close", closed=1.0, open=0.2),
        ),
        actions=pose(
            Values("action/future/xyz_residual[0:3]", plus="observation/present/xyz[0:3]"),
            Turn("action/future/axis_angle_residual[0:3]", "rotvec", plus="observation/present/axis_angle[0:3]"),
            Gripper("action/future/target_close[0:1]", closed=1.0, open=0.0),
        ),
        notes="Actions are the first of ten future targets. Use version 0.1.0: later ones are damaged.",
    ),
    _pr2("utokyo_pr2_opening_fridge_converted_externally_to_rlds"),
    _pr2("utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds"),
    DatasetSpec(
        "utokyo_xarm_pick_and_place_converted_externally_to_rlds",
        primary="image",
        secondary="image2",
        wrist="hand_image",
        control_hz=10.0,
        features={"observation/joint_state": (14,)},
        proprio=vector(joints("observation/joint_state[0:7]")),
        notes="Actions are left out: sources disagree whether they are poses or changes.",
    ),
    DatasetSpec(
        "utokyo_xarm_bimanual_converted_externally_to_rlds",
        primary="image",
        control_hz=10.0,
        features={"observation/pose_l": (6,), "observation/pose_r": (6,)},
        proprio=vector(
            Values("observation/pose_l[0:6]", "left position and yaw-pitch-roll", RAW),
            Values("observation/pose_r[0:6]", "right position and yaw-pitch-roll", RAW),
        ),
        notes="Actions are left out: sources disagree whether they are poses or changes.",
    ),
    DatasetSpec(
        "robo_net",
        primary="image",
        secondary="image1",
        control_hz=1.0,
        features={"action": (5,), "observation/state": (5,)},
        proprio=vector(
            Values("observation/state[0:3]", "position", RAW),
            Values("observation/state[3:4]", "yaw", RADIANS),
            Values("observation/state[4:5]", "gripper", RAW),
        ),
        actions=delta(step("action[0:3]", RAW), Turn("action[3:4]", "yaw"), Gripper("action[4:5]", closed=1.0, open=-1.0)),
        notes="Seven robots; the gripper's state has a different unit on each.",
    ),
    dataclasses.replace(_mvp("berkeley_mvp_converted_externally_to_rlds", 5.0), notes="The only camera is at the wrist."),
    dataclasses.replace(_mvp("berkeley_rpt_converted_externally_to_rlds", 30.0), notes="The only camera is at the wrist."),
    DatasetSpec(
        "kaist_nonprehensile_converted_externally_to_rlds",
        primary="image",
        control_hz=10.0,
        features={"action": (20,), "observation/state": (21,)},
        proprio=pose(Values("observation/state[14:17]"), Turn("observation/state[17:21]", "quat_xyzw"), NO_GRIPPER),
        actions=flat_delta(NO_GRIPPER, "rotvec", METRES),
        notes="The gripper stays closed. Gains of the controller are left out.",
    ),
    DatasetSpec(
        "tokyo_u_lsmo_converted_externally_to_rlds",
        primary="image",
        control_hz=10.0,
        features={"action": (7,), "observation/state": (13,)},
        proprio=pose(
            Values("observation/state[0:3]"),
            Turn("observation/state[3:6]", "euler_xyz"),
            Gripper("observation/state[12:13]", closed=1.0, open=0.0),
        ),
        actions=flat_delta(Gripper("action[6:7]", closed=1.0, open=0.0)),
    ),
    _dlr("dlr_sara_pour_converted_externally_to_rlds", 6, NO_GRIPPER, 10.0),
    _dlr("dlr_sara_grid_clamp_converted_externally_to_rlds", 12, NO_GRIPPER, 10.0),
    _dlr("dlr_edan_shared_control_converted_externally_to_rlds", 7, Gripper("observation/state[6:7]", closed=1.0, open=0.0), 5.0),
    DatasetSpec(
        "asu_table_top_converted_externally_to_rlds",
        primary="image",
        control_hz=12.5,
        features={"observation/state": (7,)},
        proprio=vector(joints("observation/state[0:6]"), Values("observation/state[6:7]", "gripper", RAW)),
        notes="Actions are left out: sources disagree whether they move joints or the hand.",
    ),
    DatasetSpec(
        "stanford_robocook_converted_externally_to_rlds",
        primary="image_1",
        secondary="image_2",
        control_hz=5.0,
        features={"action": (7,), "observation/state": (7,)},
        proprio=pose(
            Values("observation/state[0:3]"),
            Turn("observation/state[3:6]", "euler_xyz"),
            Gripper("observation/state[6:7]", closed=0.0, open=0.0767),
        ),
        actions=flat_delta(Gripper("action[6:7]", closed=-1.0, open=1.0, relative=0.001), "rotvec"),
        notes="Actions are velocities, of the gripper too.",
    ),
    DatasetSpec(
        "imperialcollege_sawyer_wrist_cam",
        primary="wrist_image",
        control_hz=10.0,
        features={"action": (8,)},
        actions=delta(
            Values("action[0:3]", "Δposition in the hand's frame"),
            Turn("action[3:6]", "euler_xyz"),
            Gripper("action[6:7]", closed=1.0, open=0.0),
        ),
        notes="The only camera is at the wrist; observation/image repeats it.",
    ),
    DatasetSpec(
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        primary="image",
        wrist="wrist_image",
        control_hz=20.0,
        features={"observation/state": (20,)},
        proprio=vector(joints("observation/state[0:7]"), Gripper("observation/state[7:8]")),
        notes="Actions are left out: sources disagree whether they are poses or changes; the quaternion's order is unknown.",
    ),
    DatasetSpec(
        "uiuc_d3field",
        primary="image_1",
        secondary="image_2",
        control_hz=1.0,
        features={"action": (3,), "observation/state": (4, 4)},
        proprio=pose(Transform("observation/state[0:16]"), NO_GRIPPER),
        actions=delta(step("action[0:3]"), NO_TURN, NO_GRIPPER),
        notes="Octo and OpenVLA found images of it damaged.",
    ),
    DatasetSpec(
        "berkeley_fanuc_manipulation",
        primary="image",
        wrist="wrist_image",
        control_hz=10.0,
        features={"action": (6,), "observation/end_effector_state": (7,), "observation/state": (13,)},
        proprio=pose(
            Values("observation/end_effector_state[0:3]"),
            Turn("observation/end_effector_state[3:7]", "quat_xyzw"),
            Gripper("observation/state[6:7]", closed=1.0, open=0.0),
        ),
        actions=flat_delta(Gripper("observation/state[6:7]", closed=1.0, open=0.0)),
        notes="No gripper commands: actions have the measured state.",
    ),
    DatasetSpec(
        "cmu_play_fusion",
        primary="image",
        control_hz=5.0,
        features={"observation/state": (8,)},
        proprio=vector(joints("observation/state[0:7]"), Gripper("observation/state[7:8]", closed=0.0, open=0.085)),
        notes="Actions are left out: the order of their quaternion is unknown.",
    ),
    DatasetSpec(
        "cmu_stretch",
        primary="image",
        control_hz=10.0,
        features={"action": (8,), "observation/state": (4,)},
        proprio=vector(Values("observation/state[0:3]", "arm", RAW), Gripper("observation/state[3:4]")),
        actions=flat_delta(Gripper("action[6:7]")),
    ),
    _gnm("berkeley_gnm_recon", 3.0),
    _gnm("berkeley_gnm_cory_hall", 5.0),
    _gnm("berkeley_gnm_sac_son", 10.0),
    # Added to the collection later, or from outside it.
    DatasetSpec(
        "conq_hose_manipulation",
        primary="frontleft_fisheye_image",
        secondary="frontright_fisheye_image",
        wrist="hand_color_image",
        control_hz=30.0,
        notes="Actions and state are not documented.",
    ),
    DatasetSpec(
        "io_ai_tech", primary="image", secondary="image_left_side", control_hz=3.0, notes="Actions and state are not documented."
    ),
    DatasetSpec(
        "plex_robosuite",
        primary="image",
        wrist="wrist_image",
        control_hz=20.0,
        features={"action": (7,)},
        actions=flat_delta(Gripper("action[6:7]", closed=1.0, open=-1.0), "rotvec", NATIVE),
        notes="Simulation. The state is not documented.",
    ),
    DatasetSpec(
        "dobbe",
        primary="wrist_image",
        control_hz=30.0,
        features={"action": (7,), "observation/state": (7,)},
        proprio=pose(
            Values("observation/state[0:3]"), Turn("observation/state[3:6]", "euler_xyz"), Gripper("observation/state[6:7]")
        ),
        actions=flat_delta(Gripper("action[6:7]"), unit=METRES),
        notes="The only camera is at the wrist. Rate approximate: RDT has 30, LeRobot 3.75; 5,208 episodes in 13 hours fit 30.",
    ),
    _fmb("fmb"),
    _fmb("fmb_dataset"),
    _roboset("robo_set"),
    _roboset("roboset"),
    _aloha("aloha_mobile", None, base=True),
    _aloha("aloha_mobile_dataset", None, base=True),
    _aloha("aloha_static_dataset", "cam_low", base=False),
    _droid("droid"),
    _droid("droid_100"),
    _libero("spatial"),
    _libero("object"),
    _libero("goal"),
    _libero("10"),
)

_registry: dict[str, DatasetSpec] = {}


def register(spec: DatasetSpec) -> DatasetSpec:
    """Adds a dataset, for example of a user's own robot; registering the same entry again changes nothing.

    Raises:
        ValueError: if another entry has the name.
    """
    if _registry.setdefault(spec.name, spec) != spec:
        raise ValueError(f"dataset '{spec.name}' is registered already, with another entry; choose another name")
    return spec


def find(name: str) -> DatasetSpec:
    """The entry of a dataset. Raises ValueError, naming the most similar ones."""
    if name not in _registry:
        matches = difflib.get_close_matches(name, _registry, n=3, cutoff=0.4)
        hint = f"; the nearest are {', '.join(map(repr, matches))}" if matches else f"; there are {len(_registry)}, none like it"
        raise ValueError(f"no dataset '{name}' is registered{hint}")
    return _registry[name]


def names() -> tuple[str, ...]:
    """The names of all datasets, in the order of their registration."""
    return tuple(_registry)


for _spec in _DATASETS:
    register(_spec)
