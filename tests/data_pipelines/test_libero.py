import pickle

import h5py
import numpy as np
import pytest
from foreign_formats import SIZE, write_libero
from scipy.spatial.transform import Rotation

from data_pipelines.sources.libero import LiberoSource, moving_steps, published_prompt
from data_pipelines.sources.rlds import DatasetError

STEM = "put_the_black_bowl_on_the_plate_demo"


def command(dx=0.0, turn=0.0, gripper=-1.0):
    return [dx, 0.0, 0.0, 0.0, 0.0, turn, gripper]


# Rows 0, 2 and 5 command nothing; row 4 only opens the gripper.
ACTIONS = np.array(
    [
        command(gripper=1),
        command(0.5, 0.1, gripper=1),
        command(gripper=1),
        command(0.25, -0.2, gripper=1),
        command(gripper=-1),
        command(5e-5, gripper=-1),
        command(1.0, gripper=-1),
    ]
)
MOVING = [1, 3, 4, 6]


def row_frame(row, camera=0, size=SIZE):
    """A stored image, see `write_libero`."""
    ramp = np.arange(size[0])[:, None] + np.arange(size[1])
    return np.repeat((ramp + 2 * row + 50 * camera).astype(np.uint8)[..., None], 3, -1)


def test_no_ops():
    assert moving_steps(ACTIONS).tolist() == MOVING
    assert moving_steps(ACTIONS[MOVING]).tolist() == [0, 1, 2, 3]  # filtered before
    assert moving_steps(np.array([command(gripper=1), command(gripper=-1)])).tolist() == []  # nothing is kept yet
    assert moving_steps(np.array([command(1e-4), command(9.9e-5)])).tolist() == [0]
    toggled = [command(1.0, gripper=1), command(gripper=-1), command(gripper=-1), command(gripper=1)]
    assert moving_steps(np.array(toggled)).tolist() == [0, 1, 3]


def test_published_files(tmp_path):
    path = write_libero(tmp_path / "libero_goal" / f"{STEM}.hdf5", {"demo_0": ACTIONS})
    source = LiberoSource(tmp_path)
    assert (len(source), source.action_dim, source.proprio_dim, source.image_size, source.control_hz) == (1, 10, 10, SIZE, 20.0)
    episode = source[0]
    assert episode.name == f"{path}, demo_0" and episode.instruction == "put the bowl on the plate."
    np.testing.assert_allclose(episode.timestamps, [0, 0.05, 0.1, 0.15])
    assert episode.action_layout == "delta" and episode.actions.dtype == episode.proprio.dtype == np.float32
    # Row 3 by hand: at (3, 3.1, 3.2), turned by 0.3 about z, first finger at 0.037; commands 0.25 along x and −0.2 about z.
    cos, sin = np.cos(0.3), np.sin(0.3)
    np.testing.assert_allclose(episode.proprio[1], [3, 3.1, 3.2, cos, -sin, 0, sin, cos, 0, 0.037], atol=1e-6)
    cos, sin = np.cos(-0.2), np.sin(-0.2)
    np.testing.assert_allclose(episode.actions[1], [0.25, 0, 0, cos, -sin, 0, sin, cos, 0, 1], atol=1e-6)
    assert episode.actions[:, 9].tolist() == [1, 1, -1, -1]
    np.testing.assert_array_equal(episode.frames.take([1, 0, 1, -1]), [row_frame(row) for row in (3, 1, 3, 6)])
    np.testing.assert_array_equal(episode.further_cameras["wrist"].take([2]), [row_frame(4, camera=1)])


def test_openvlas_files_are_upside_down(tmp_path):
    write_libero(tmp_path / f"{STEM}.hdf5", {"demo_0": ACTIONS}, kind="openvla")
    episode = LiberoSource(tmp_path)[0]
    np.testing.assert_array_equal(episode.frames.take([0]), [row_frame(1)[::-1, ::-1]])
    np.testing.assert_array_equal(episode.further_cameras["wrist"].take([0]), [row_frame(1, 1)[::-1, ::-1]])
    published = write_libero(tmp_path / "published" / f"{STEM}.hdf5", {"demo_0": ACTIONS})
    np.testing.assert_allclose(episode.proprio, LiberoSource(published)[0].proprio, atol=1e-6)


def test_liberos_own_observations_follow_their_actions(tmp_path):
    path = write_libero(tmp_path / f"{STEM}.hdf5", {"demo_0": ACTIONS}, kind="libero")
    episode = LiberoSource(path)[0]
    np.testing.assert_allclose(episode.actions[:, 0], ACTIONS[MOVING, 0], atol=1e-6)
    assert episode.proprio[:, 0].tolist() == [row - 1 for row in MOVING]  # where the arm was when it was told
    np.testing.assert_array_equal(episode.frames.take([0]), [row_frame(0)[::-1, ::-1]])
    assert episode.instruction == "put the bowl on the plate."
    assert LiberoSource(path, instructions="recorded")[0].instruction == "Put it there"


@pytest.mark.parametrize(("kind", "upside_down"), [("openvla", False), ("published", True)])
def test_the_caller_may_know_better(tmp_path, kind, upside_down):
    path = write_libero(tmp_path / "x_demo.hdf5", {"demo_0": ACTIONS}, kind=kind)
    stored = row_frame(1)[::-1, ::-1] if upside_down else row_frame(1)
    np.testing.assert_array_equal(LiberoSource(path, upside_down=upside_down)[0].frames.take([0]), [stored])


@pytest.mark.parametrize(
    ("stem", "prompt"),
    [
        (STEM, "put the bowl on the plate."),
        ("KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it_demo", "turn on the stove and put the moka pot on it."),
        ("LIVING_ROOM_SCENE10_pick_up_it", "pick up it."),
    ],
)
def test_prompts(stem, prompt):
    assert published_prompt(stem) == prompt


def test_order_of_files_and_demonstrations(tmp_path):
    moving = np.array([command(1.0), command(1.0)])
    write_libero(tmp_path / "b" / "a_task_demo.hdf5", {f"demo_{k}": moving for k in (10, 2)})
    write_libero(tmp_path / "a" / "b_task_demo.h5", {"demo_0": moving})
    source = LiberoSource(tmp_path)
    assert [episode.name.removeprefix(f"{tmp_path}/") for episode in source] == [
        "a/b_task_demo.h5, demo_0",
        "b/a_task_demo.hdf5, demo_2",
        "b/a_task_demo.hdf5, demo_10",
    ]
    assert [episode.instruction for episode in source] == ["b task.", "a task.", "a task."]
    with pytest.raises(IndexError, match="3 episodes"):
        source[3]


def test_what_is_left_out_is_noted(tmp_path):
    still = np.array([command(gripper=1)] * 3)
    write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS, "demo_1": still})
    write_libero(tmp_path / "b_demo.hdf5", {"demo_0": ACTIONS}, success=False)
    source = LiberoSource(tmp_path)
    assert len(source) == 1
    assert source.skipped == {
        "it has no action that moves the robot": [f"{tmp_path}/a_demo.hdf5, demo_1"],
        "its last step does not report success": [f"{tmp_path}/b_demo.hdf5, demo_0"],
    }
    with pytest.raises(DatasetError, match=r"no usable demonstration; left out: .*report success"):
        LiberoSource(tmp_path / "b_demo.hdf5")


def test_images_are_not_read_before_take(tmp_path, monkeypatch):
    path = write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS})
    read, real = [], h5py.Dataset.__getitem__

    def noting(dataset, *arguments, **more):
        read.append(dataset.name)
        return real(dataset, *arguments, **more)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", noting)
    episode = LiberoSource(path)[0]
    assert read and not any("rgb" in name for name in read)
    episode.frames.take([0])
    assert read[-1] == "/data/demo_0/obs/agentview_rgb"


def test_workers_and_sizes(tmp_path):
    write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS})
    write_libero(tmp_path / "b_demo.hdf5", {"demo_0": ACTIONS}, size=(24, 32))
    with pytest.raises(DatasetError, match=r"b_demo\.hdf5, demo_0: images are \(24, 32\); those of the first one are \(48, 64\)"):
        LiberoSource(tmp_path)
    source = pickle.loads(pickle.dumps(LiberoSource(tmp_path, image_size=(12, 16))))
    assert source.image_size == (12, 16)
    assert {source[k].frames.take([0, 1]).shape for k in (0, 1)} == {(2, 12, 16, 3)}


def edited(path, change):
    with h5py.File(path, "r+") as file:
        change(file["data/demo_0"])
    return path


def replace(key, values):
    def change(demo):
        del demo[key]
        demo[key] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda demo: demo.pop("actions"), r"has no 'actions'; it has dones, obs, obs/agentview_rgb"),
        (lambda demo: demo["obs"].pop("agentview_rgb"), r"has no 'obs/agentview_rgb'; it has actions"),
        (replace("actions", np.zeros((7, 6))), r"actions has shape \(7, 6\); expected \(n, 7\)"),
        (replace("obs/ee_ori", np.zeros((7, 5))), "obs/ee_ori has width 5; expected 3, a rotation vector, or 4"),
        (replace("obs/ee_ori", np.zeros((7, 4))), "obs/ee_ori is not an orientation"),
        (replace("obs/ee_pos", np.zeros((6, 3))), "obs/ee_pos has 6 steps, actions have 7"),
        (replace("obs/agentview_rgb", np.zeros((7, 4, 4, 3))), r"obs/agentview_rgb is float64 \(7, 4, 4, 3\); expected uint8"),
        (replace("actions", np.where(np.arange(7)[:, None] == 3, np.nan, ACTIONS)), "actions is not finite at step 3"),
    ],
)
def test_wrong_demonstrations_are_named_or_left_out(tmp_path, change, message):
    path = edited(write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS, "demo_1": ACTIONS}), change)
    with pytest.raises(DatasetError, match=rf"a_demo\.hdf5, demo_0:? {message}"):
        LiberoSource(path)
    source = LiberoSource(path, skip_damaged=True)
    assert [episode.name for episode in source] == [f"{path}, demo_1"] and len(source.skipped["it is damaged"]) == 1


def test_files_that_are_damaged(tmp_path):
    path = write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS})
    source = LiberoSource(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"a_demo\.hdf5 cannot be read as HDF5"):
        LiberoSource(path)
    with pytest.raises(DatasetError, match=r"a_demo\.hdf5 cannot be read as HDF5"):
        source[0].frames.take([0])
    write_libero(tmp_path / "b_demo.hdf5", {"demo_0": ACTIONS})
    kept = LiberoSource(tmp_path, skip_damaged=True)
    assert len(kept) == 1 and "a_demo.hdf5 cannot be read" in kept.skipped["it is damaged"][0]
    with pytest.raises(DatasetError, match="not an HDF5 file nor a folder"):
        LiberoSource(tmp_path / "nowhere")
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        file["elsewhere"] = 1
    with pytest.raises(DatasetError, match=r"c\.hdf5 has no group 'data'"):
        LiberoSource(tmp_path / "c.hdf5")


def test_recorded_instructions_need_their_attribute(tmp_path):
    path = write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS})
    with pytest.raises(DatasetError, match=r"a_demo\.hdf5: attribute 'problem_info'.*pass instructions='published'"):
        LiberoSource(path, instructions="recorded")
    with pytest.raises(ValueError, match="instructions is 'spoken'"):
        LiberoSource(path, instructions="spoken")


def test_orientations_agree_with_scipy(tmp_path):
    path = write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS})
    turned = Rotation.random(7, random_state=0)
    edited(path, replace("obs/ee_ori", turned.as_quat()))
    rows = turned.as_matrix()[MOVING][:, :2].reshape(-1, 6)
    np.testing.assert_allclose(LiberoSource(path)[0].proprio[:, 3:9], rows, atol=1e-6)
    edited(path, replace("obs/ee_ori", turned.as_rotvec()))
    np.testing.assert_allclose(LiberoSource(path)[0].proprio[:, 3:9], rows, atol=1e-6)


def test_a_wrist_camera_of_another_kind_is_left_out(tmp_path):
    path = write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS})
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0/obs"]
        del demo["eye_in_hand_rgb"]
        demo["eye_in_hand_rgb"] = np.zeros((len(ACTIONS), *SIZE, 4), np.uint8)
    source = LiberoSource(path)
    assert source[0].further_cameras == {}
    ((reason, (message,)),) = source.skipped.items()
    assert reason == "it is no camera of RGB images" and f"{path}, demo_0: obs/eye_in_hand_rgb is uint8" in message


def test_a_prompt_that_is_no_text(tmp_path):
    path = write_libero(tmp_path / "a_demo.hdf5", {"demo_0": ACTIONS}, kind="libero")
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = '{"language_instruction": null}'
    with pytest.raises(DatasetError, match=rf"{path}: attribute 'problem_info' of 'data' records no language_instruction"):
        LiberoSource(path, instructions="recorded")
