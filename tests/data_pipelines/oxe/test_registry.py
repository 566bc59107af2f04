import dataclasses
import pathlib
import runpy

import numpy as np
import pytest
import tensorflow_datasets as tfds
from declared import STEPS, make_columns, parts

from data_pipelines.oxe import registry
from data_pipelines.oxe.spec import DatasetSpec, DeclaredFeature, SchemaError, check_schema, expected_features, flatten_features
from data_pipelines.oxe.standardise import Gripper, LastCommand, Turn, Values, delta, parse, pose, vector

TEMPLATE = pathlib.Path(__file__).parents[3] / "configs" / "my_robot.py"


def test_there_are_many():
    assert len(registry.names()) >= 60


@pytest.mark.parametrize("name", registry.names())
def test_every_entry_standardises_what_it_declares(name):
    spec = registry.find(name)
    assert spec.name == name and 1 <= spec.control_hz <= 50 and spec.cameras["primary"] == spec.primary
    columns = make_columns(spec)
    assert tuple(columns) == spec.columns
    proprio, actions = spec.standardise(columns)
    for layout, values in ((spec.proprio, proprio), (spec.actions, actions)):
        if layout is None:
            assert values is None
            continue
        assert values.shape == (STEPS, layout.width) and values.dtype == np.float32 and np.isfinite(values).all()
        start = 0
        for part in layout.parts:
            if isinstance(part, Gripper | LastCommand):
                assert part.width == 1 and 0 <= values[:, start].min() <= values[:, start].max() <= 1
            start += part.width
        if layout.kind != "vector":
            rows = values[:, 3:9].reshape(-1, 2, 3)
            np.testing.assert_allclose(rows @ rows.transpose(0, 2, 1), np.tile(np.eye(2), (STEPS, 1, 1)), atol=1e-5)


@pytest.mark.parametrize("name", registry.names())
def test_open_and_closed_are_the_ends_of_every_gripper(name):
    spec = registry.find(name)
    for part in (part.gripper if isinstance(part, LastCommand) else part for part in parts(spec)):
        if isinstance(part, Gripper):
            path, first, last = parse(part.column)
            raw = np.zeros((2, last))
            raw[:, first] = (part.open, part.closed)
            np.testing.assert_array_equal(part({path: raw})[:, 0], [1, 0])


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.find(name).features])
def test_entries_refuse_what_is_not_finite(name):
    spec = registry.find(name)
    columns = make_columns(spec)
    path, first, _ = parse(parts(spec)[0].references[0])
    columns[path].reshape(STEPS, -1)[4, first] = np.inf
    with pytest.raises(ValueError, match=rf"dataset '{name}', (proprio|actions): feature '{path}' is not finite at step 4"):
        spec.standardise(columns)


# Hand-computed.

QUARTER = [0, -1, 0, 1, 0, 0]  # rot6d rows of a quarter turn about z
NONE = [1, 0, 0, 0, 1, 0]


def standardise(name, **columns):
    return registry.find(name).standardise({f"steps/{path}": np.array(values) for path, values in columns.items()})


def test_bridge():
    proprio, actions = standardise(
        "bridge_orig",
        **{
            "observation/state": [
                [0.1, 0.2, 0.3, 0, 0, 0, 0.9],
                [0.2, 0.2, 0.3, 0, 0, np.pi / 2, 1.1],
                [0, 0.2, 0.3, 0, 0, 0, 0.1],
            ],
            "action": [[0.0] * 7, [0.1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]],
        },
    )
    # The recorded frame is the hand's, turned: with zero angles the hand's x axis points down, its z axis along the base's x.
    np.testing.assert_allclose(
        proprio,
        [
            [0.1, 0.2, 0.3, 0, 0, 1, 0, 1, 0, 0.9],
            [0.2, 0.2, 0.3, 0, -1, 0, 0, 0, 1, 1.0],
            [0.0, 0.2, 0.3, 0, 0, 1, 0, 1, 0, 0.1],
        ],
        atol=1e-6,
    )
    np.testing.assert_array_equal(actions[:, :9], proprio[:, :9])  # poses that were reached
    np.testing.assert_array_equal(actions[:, 9], [1, 1, 1])  # with the command before; the first action is a placeholder


def test_bridge_of_the_bucket():
    _, actions = standardise(
        "bridge",
        **{
            "observation/state": np.zeros((3, 7)),
            "action/world_vector": np.ones((3, 3)),
            "action/rotation_delta": np.zeros((3, 3)),
            "action/open_gripper": [True, False, True],
        },
    )
    np.testing.assert_array_equal(actions[:, 9], [1, 1, 0])


def test_fractal():
    half = np.sqrt(0.5)
    proprio, actions = standardise(
        "fractal20220817_data",
        **{
            "observation/base_pose_tool_reached": [[0.5, 0.1, 0.8, 0, 0, half, half]] * 3,
            "observation/gripper_closed": [[0], [0.25], [1]],
            "action/world_vector": [[0.01, 0, 0]] * 3,
            "action/rotation_delta": [[0, 0, np.pi / 2]] * 3,
            "action/gripper_closedness_action": [[0], [1], [0]],
        },
    )
    np.testing.assert_allclose(proprio, [[0.5, 0.1, 0.8, *QUARTER, g] for g in (1, 0.75, 0)], atol=1e-6)
    np.testing.assert_allclose(actions, [[0.01, 0, 0, *QUARTER, g] for g in (1, 0, 0)], atol=1e-6)


def test_kuka():
    proprio, actions = standardise(
        "kuka",
        **{
            "observation/clip_function_input/base_pose_tool_reached": [[0.5, 0, 0.2, 0, 0, 0, 1]] * 2,
            "observation/gripper_closed": [[1], [0]],
            "action/world_vector": [[0, 0, -0.05]] * 2,
            "action/rotation_delta": [[0, 0, 0]] * 2,
            "action/gripper_closedness_action": [[0], [-1]],
        },
    )
    np.testing.assert_allclose(proprio, [[0.5, 0, 0.2, *NONE, 0], [0.5, 0, 0.2, *NONE, 1]], atol=1e-6)
    np.testing.assert_allclose(actions, [[0, 0, -0.05, *NONE, 0], [0, 0, -0.05, *NONE, 1]], atol=1e-6)


def test_droid():
    proprio, actions = standardise(
        "droid",
        **{
            "observation/cartesian_position": [[0.4, 0, 0.5, 0, 0, np.pi / 2]],
            "observation/gripper_position": [[0.25]],
            "action_dict/cartesian_position": [[0.41, 0, 0.5, np.pi, 0, 0]],
            "action_dict/gripper_position": [[1.0]],
        },
    )
    np.testing.assert_allclose(proprio, [[0.4, 0, 0.5, *QUARTER, 0.75]], atol=1e-6)
    np.testing.assert_allclose(actions, [[0.41, 0, 0.5, 1, 0, 0, 0, -1, 0, 0]], atol=1e-6)
    assert registry.find("droid").action_layout == "pose"


def test_libero():
    proprio, actions = standardise(
        "libero_spatial_no_noops",
        **{
            "observation/state": [[-0.2, 0, 1.17, 0, 0, np.pi / 2, 0.03, -0.03]],
            "action": [[0.5, -0.5, 0, 0, 0, 0.3, -1]],
        },
    )
    np.testing.assert_allclose(proprio, [[-0.2, 0, 1.17, *QUARTER, 0.75]], atol=1e-6)
    c, s = np.cos(0.3), np.sin(0.3)
    np.testing.assert_allclose(actions, [[0.5, -0.5, 0, c, -s, 0, s, c, 0, 1]], atol=1e-6)
    assert registry.find("libero_spatial_no_noops").action_layout == "delta"


def test_joint_space():
    joints = np.arange(7) / 10
    proprio, actions = standardise(
        "berkeley_mvp_converted_externally_to_rlds",
        **{
            "observation/joint_pos": [joints],
            "observation/gripper": [True],
            "action": [[*(joints / 10), 0]],
        },
    )
    np.testing.assert_allclose(proprio, [[*joints, 0]], atol=1e-7)
    np.testing.assert_allclose(actions, [[*(joints / 10), 1]], atol=1e-7)
    assert registry.find("berkeley_mvp_converted_externally_to_rlds").action_layout == "vector"


def test_residuals_are_targets():
    proprio, actions = standardise(
        "bc_z",
        **{
            "observation/present/xyz": [[0.1, 0.2, 0.3]],
            "observation/present/axis_angle": [[0, 0, np.pi / 4]],
            "observation/present/sensed_close": [[0.2]],
            "action/future/xyz_residual": [[0.01, 0, 0] + [9.0] * 27],
            "action/future/axis_angle_residual": [[0, 0, np.pi / 4] + [9.0] * 27],
            "action/future/target_close": [[1] + [0] * 9],
        },
    )
    assert proprio[0, 9] == 1
    np.testing.assert_allclose(actions, [[0.11, 0.2, 0.3, *QUARTER, 0]], atol=1e-6)


def test_documented_scales():
    _, actions = standardise(
        "maniskill_dataset_converted_externally_to_rlds",
        **{
            "action": [[1, 0, 0, 0, 0, 1, -1]],
            "observation/tcp_pose": [[0, 0, 0, 1, 0, 0, 0]],
            "observation/state": np.zeros((1, 18)),
        },
    )
    np.testing.assert_allclose(actions[0, [0, 3, 6, 9]], [0.1, np.cos(0.1), np.sin(0.1), 0], atol=1e-6)
    proprio, _ = standardise(
        "utokyo_pr2_opening_fridge_converted_externally_to_rlds",
        **{"action": np.zeros((1, 8)), "observation/state": [[500, -100, 900, 0, 0, 0, 86.7]]},
    )
    np.testing.assert_allclose(proprio, [[0.5, -0.1, 0.9, *NONE, 1]], atol=1e-6)


# Entries of one's own.

ROBOT = DatasetSpec(
    "robot",
    primary="image",
    control_hz=10.0,
    features={"action": (7,), "observation/state": (7,)},
    proprio=vector(Values("observation/state[0:7]", "joints", "rad")),
    actions=delta(Values("action[0:3]"), Turn("action[3:6]", "rotvec"), Gripper("action[6:7]")),
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"control_hz": 0.0}, "dataset 'robot': control_hz is 0.0"),
        ({"primary": None}, "primary is None; expected a string"),
        ({"wrist": "image"}, "expected different ones"),
        ({"features": {"action": (7,)}}, "read 'observation/state', which features do not declare; the nearest is 'action'"),
        ({"features": {"action": (6,), "observation/state": (7,)}}, r"'action\[6:7\]' reads beyond the 6 dimensions of 'action'"),
        ({"features": ROBOT.features | {"reward": ()}}, r"features \['reward'\] are declared but no layout reads them"),
        ({"actions": pose(*ROBOT.actions.parts)}, "actions are poses but proprio is vector"),
    ],
)
def test_entries_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROBOT, **change)


def test_registering(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    assert registry.find(registry.register(ROBOT).name) is ROBOT
    registry.register(ROBOT)
    with pytest.raises(ValueError, match="'robot' is registered already"):
        registry.register(dataclasses.replace(ROBOT, control_hz=5.0))
    with pytest.raises(ValueError, match="no dataset 'fractal_data' is registered; the nearest are 'fractal20220817_data'"):
        registry.find("fractal_data")


def test_the_template(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    text = TEMPLATE.read_text()
    assert len(text.splitlines()) <= 40
    spec = runpy.run_path(str(TEMPLATE))["MY_ROBOT"]
    assert registry.find("my_robot") is spec and spec.labelled
    proprio, actions = spec.standardise(
        {
            "steps/observation/state": np.array([[0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04]] * 3),
            "steps/action": np.array([[0.1, 0.2, 0.3, 0, 0, np.pi / 2, g] for g in (0.9, 0.0, -0.8)]),
        }
    )
    np.testing.assert_allclose(proprio, [[0.1, 0.2, 0.3, *QUARTER, 0.5]] * 3, atol=1e-6)
    np.testing.assert_array_equal(actions[:, 9], [1, 1, 0])


def features_of(spec):
    features = {f"steps/observation/{key}": DeclaredFeature("image", (64, 64, 3), "uint8") for key in spec.cameras.values()}
    features[spec.language_path] = DeclaredFeature("text", (), "object")
    return features | {f"steps/{path}": DeclaredFeature("tensor", shape, "float32") for path, shape in spec.features.items()}


@pytest.mark.parametrize("name", registry.names())
def test_schema_of_every_entry(name):
    spec = registry.find(name)
    features = features_of(spec)
    check_schema(features, spec)
    assert set(expected_features(spec)) == set(features)
    for path in features:
        with pytest.raises(SchemaError, match=rf"'{path}' is missing"):
            check_schema({p: f for p, f in features.items() if p != path}, spec)


def test_schema_names_everything_that_is_wrong():
    spec = registry.find("bridge_orig")
    features = features_of(spec)
    features["steps/observation/image_9"] = features.pop("steps/observation/image_0")
    features["steps/observation/image_1"] = DeclaredFeature("image", (256, 256, 1), "uint8")
    features["steps/action"] = DeclaredFeature("tensor", (8,), "float32")
    features["steps/observation/stat"] = features.pop("steps/observation/state")
    features["steps/language_instruction"] = DeclaredFeature("tensor", (512,), "float32")
    with pytest.raises(SchemaError) as error:
        check_schema(features, spec)
    assert str(error.value).splitlines() == [
        "dataset 'bridge_orig' does not have the features that its entry declares:",
        "  'steps/observation/image_0' is missing; expected the primary camera, an image uint8 (height, width, 3); "
        "the nearest is 'steps/observation/image_9'",
        "  'steps/observation/image_1' is image uint8 (256, 256, 1); expected the secondary camera, an image uint8 (height, "
        "width, 3)",
        "  'steps/language_instruction' is tensor float32 (512,); expected the instruction, text or its bytes as integers",
        "  'steps/action' is tensor float32 (8,); expected numbers of shape (7,)",
        "  'steps/observation/state' is missing; expected numbers of shape (7,); the nearest is 'steps/observation/stat'",
    ]


def test_features_of_a_tfds_tree():
    image = tfds.features.Image(shape=(8, 16, 3), dtype=np.uint8, encoding_format="jpeg")
    tree = tfds.features.FeaturesDict(
        {
            "episode_metadata": {"task": tfds.features.Text()},
            "steps": tfds.features.Dataset(
                {
                    "action": {"open_gripper": np.bool_, "future/xyz": tfds.features.Tensor(shape=(30,), dtype=np.float32)},
                    "observation": {"image": image, "instruction": tfds.features.Tensor(shape=(), dtype=np.str_)},
                }
            ),
        }
    )
    assert flatten_features(tree) == {
        "episode_metadata/task": DeclaredFeature("text", (), "object"),
        "steps/action/open_gripper": DeclaredFeature("tensor", (), "bool"),
        "steps/action/future/xyz": DeclaredFeature("tensor", (30,), "float32"),
        "steps/observation/image": DeclaredFeature("image", (8, 16, 3), "uint8"),
        "steps/observation/instruction": DeclaredFeature("text", (), "object"),
    }


def test_instructions_may_be_as_bytes_or_of_the_episode():
    spec = registry.find("language_table")
    check_schema(features_of(spec) | {spec.language_path: DeclaredFeature("tensor", (512,), "int32")}, spec)
    spec = dataclasses.replace(ROBOT, language="episode_metadata/task")
    assert spec.language_path == "episode_metadata/task"
    check_schema(features_of(spec), spec)


def test_the_template_of_joints(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    spec = runpy.run_path(str(TEMPLATE.with_name("my_joints.py")))["MY_JOINTS"]
    assert registry.find("my_joints") is spec and spec.labelled and spec.action_layout == "vector"
    values = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 25.0]])
    proprio, actions = spec.standardise({"steps/observation/state": values, "steps/action": 2 * values})
    np.testing.assert_allclose(proprio, [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.25]], atol=1e-6)
    np.testing.assert_allclose(actions, [[0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 0.5]], atol=1e-6)
    assert spec.actions.dimensions[5:] == ("joints 5 [rad]", "gripper [1 = open]")
