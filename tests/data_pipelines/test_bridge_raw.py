import pickle
import re

import numpy as np
import pytest
from foreign_formats import SIZE, grey, write_bridge
from PIL import Image

from data_pipelines.sources.bridge_raw import BridgeSource, clean_label, read_pickle
from data_pipelines.sources.rlds import DatasetError


def greys(taken):
    return taken.mean((1, 2, 3))


def test_episodes_come_back(tmp_path):
    folder = write_bridge(tmp_path)
    source = BridgeSource(tmp_path)
    assert (len(source), source.action_dim, source.proprio_dim, source.image_size, source.control_hz) == (1, 10, 10, SIZE, 5.0)
    episode = source[0]
    assert episode.name == str(folder) and episode.instruction == "put the pot left" and episode.action_layout == "pose"
    np.testing.assert_allclose(episode.timestamps, [0, 0.2, 0.4, 0.6, 0.8])
    assert episode.timestamps.dtype == np.float64 and episode.proprio.dtype == episode.actions.dtype == np.float32
    # Step 2 is state 3 by hand: at (3, 0.1, 0.2), turned by 0.3 about z, gripper at 0.75 and told to be open.
    cos, sin = np.cos(0.3), np.sin(0.3)
    np.testing.assert_allclose(episode.proprio[2], [3, 0.1, 0.2, cos, -sin, 0, sin, cos, 0, 0.75], atol=1e-6)
    np.testing.assert_allclose(episode.actions[2], [3, 0.1, 0.2, cos, -sin, 0, sin, cos, 0, 1], atol=1e-6)
    assert episode.actions[:, 9].tolist() == [1, 0, 1, 0, 1]
    taken = episode.frames.take([4, 0, -1])
    assert taken.shape == (3, *SIZE, 3)
    np.testing.assert_allclose(greys(taken), [grey(0, 5), grey(0, 1), grey(0, 5)], atol=2)
    with pytest.raises(IndexError, match="episode of 5"):
        episode.frames.take([5])
    with pytest.raises(IndexError, match="1 episodes"):
        source[1]


def test_grippers_are_clipped(tmp_path):
    full = np.zeros((6, 7))
    full[:, 6] = [0, 1.2, 0.5, -0.1, 1, 0]
    write_bridge(tmp_path, changes={"full_state": full, "desired_state": 2 * full})
    episode = BridgeSource(tmp_path)[0]
    np.testing.assert_allclose(episode.proprio[:, 9], [1, 0.5, 0, 1, 0])
    np.testing.assert_allclose(episode.actions[:, 9], [1, 1, 0, 1, 0])


def test_further_cameras_where_there_are_any(tmp_path):
    write_bridge(tmp_path, "a/pick", cameras=("images0", "images1"))
    write_bridge(tmp_path, "b/pick")
    source = BridgeSource(tmp_path, cameras={"primary": "images0", "secondary": "images1"})
    assert [set(episode.further_cameras) for episode in source] == [{"secondary"}, set()]
    np.testing.assert_allclose(greys(source[0].further_cameras["secondary"].take([2])), [grey(0, 3, 1)], atol=2)
    assert len(BridgeSource(tmp_path, cameras={"primary": "images1"})) == 1
    with pytest.raises(DatasetError, match=r"roles \['wrist'\]"):
        BridgeSource(tmp_path, cameras={"wrist": "images1"})


def test_the_distribution_has_a_folder_raw_on_top(tmp_path):
    folder = write_bridge(tmp_path / "raw" / "bridge_data_v2")
    for root in (tmp_path, tmp_path / "raw", folder.parents[1]):
        assert [episode.name for episode in BridgeSource(root)] == [str(folder)]


def test_order_and_what_is_left_out(tmp_path):
    write_bridge(tmp_path, "b/pick", length=4)
    write_bridge(tmp_path, "a/pick", trajectory="raw/traj_group0/traj1", length=5)
    write_bridge(tmp_path, "a/pick", trajectory="raw/traj_group0/traj0", length=6)
    write_bridge(tmp_path, "a/elsewhere", trajectory="processed/traj_group0/traj0")
    lmdb = write_bridge(tmp_path, "a/pick_lmdb")
    incomplete = {}
    for name in ("obs_dict.pkl", "policy_out.pkl"):
        incomplete[name] = write_bridge(tmp_path, f"c/{name[0]}")
        (incomplete[name] / name).unlink()
    blind = write_bridge(tmp_path, "c/blind", cameras=())
    short = write_bridge(tmp_path, "c/short")
    (short / "images0" / "im_5.jpg").unlink()
    gappy = write_bridge(tmp_path, "c/gappy")
    (gappy / "images0" / "im_3.jpg").rename(gappy / "images0" / "im_9.jpg")
    single = write_bridge(tmp_path, "c/single", length=1)
    source = BridgeSource(tmp_path)
    assert [len(episode) for episode in source] == [5, 4, 3]
    assert source.skipped == {
        "it is part of an LMDB copy": [str(lmdb)],
        "it has no obs_dict.pkl": [str(incomplete["obs_dict.pkl"])],
        "it has no policy_out.pkl": [str(incomplete["policy_out.pkl"])],
        "it has no images0": [str(blind)],
        "it has not as many images in images0 as states, or fewer than two": [str(short), str(single)],
        "images in images0 are not numbered im_0.jpg to im_{n−1}.jpg": [str(gappy)],
    }
    with pytest.raises(DatasetError, match=r"no usable \*\*/raw/traj_group\*/traj\*; left out: .*LMDB"):
        BridgeSource(tmp_path / "a" / "pick_lmdb" / "..", cameras={"primary": "images7"})


def test_images_are_not_read_before_take(tmp_path, monkeypatch):
    folder = write_bridge(tmp_path)
    for image in (folder / "images0").iterdir():
        image.write_bytes(b"no image")
    source = BridgeSource(tmp_path)
    with pytest.raises(DatasetError, match=r"images0/im_3\.jpg cannot be read"):
        source[0].frames.take([2])
    with pytest.raises(DatasetError, match=r"images0/im_1\.jpg cannot be read"):
        _ = source.image_size


def test_sizes_and_workers(tmp_path):
    folder = write_bridge(tmp_path)
    Image.new("RGB", (10, 10)).save(folder / "images0" / "im_2.jpg")
    with pytest.raises(DatasetError, match=r"im_2\.jpg is \(10, 10\); .*im_1\.jpg is \(48, 64\)"):
        BridgeSource(tmp_path)[0].frames.take([0, 1])
    source = pickle.loads(pickle.dumps(BridgeSource(tmp_path, image_size=(24, 32))))
    assert source.image_size == (24, 32) and source[0].frames.take([3]).shape == (1, 24, 32, 3)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays(tmp_path, protocol):
    record = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.eye(2, 3)),
        "s": np.float64(0.5),
        "l": [1, (2.0, "x")],
        "b": b"raw",
        "n": None,
        "c": 1 + 2j,
        "e": {1, 2},
        "o": np.array([{"k": np.int32(3)}], object),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(record, protocol=protocol))
    found = read_pickle(tmp_path / "a.pkl")
    assert set(found) == set(record) and found["o"][0]["k"] == 3
    np.testing.assert_array_equal(found["a"], record["a"])
    np.testing.assert_array_equal(found["f"], record["f"])
    assert [found[key] for key in "slbnce"] == [record[key] for key in "slbnce"]


def test_pickles_of_numpy_1(tmp_path):
    content = pickle.dumps({"a": np.arange(3.0)}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in content
    (tmp_path / "a.pkl").write_bytes(content)
    np.testing.assert_array_equal(read_pickle(tmp_path / "a.pkl")["a"], [0, 1, 2])


class _Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "subprocess.check_output"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol, name):
    module, function = name.split(".")
    marker = tmp_path / "marker"
    arguments = {
        "eval": [f"open({str(marker)!r}, 'w')"],
        "check_output": [["touch", str(marker)]],
        "getattr": ["text", "upper"],
    }
    call = _Calls(getattr(__import__(module), function), *arguments.get(function, [f"touch {marker}"]))
    folder = write_bridge(tmp_path)
    path = folder / "obs_dict.pkl"
    path.write_bytes(pickle.dumps({"eef_transform": call}, protocol))
    with pytest.raises(DatasetError, match=rf"{re.escape(str(path))} cannot be read .*{function}, which is no part"):
        BridgeSource(tmp_path)
    assert not marker.exists()
    if function in ("system", "eval", "check_output"):  # what was refused is malicious indeed
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04]",
        b"cos\nsystem\n(S'true'\ntR.",
        b"csubprocess\nPopen\n.",
        b"P1\n.",
        b"\x80\x04\x8c",
    ],
)
def test_damaged_and_odd_pickles(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.pkl cannot be read as a pickle of arrays"):
        read_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eef_transform": None}, "eef_transform is not|eef_transform has shape"),
        ({"eef_transform": np.zeros((6, 4, 4))}, "eef_transform: 'rotations' has no rotation matrix at index"),
        ({"full_state": np.zeros((6, 6))}, r"full_state has shape \(6, 6\); expected \('n', 7\)"),
        ({"desired_state": np.full((6, 7), np.nan)}, "desired_state is not finite at step 0"),
        ({"time_stamp": [0.0, 1, 2, 2, 3, 4]}, "time_stamp does not increase"),
        ({"time_stamp": ["now"] * 6}, "time_stamp is not an array of numbers"),
    ],
)
def test_wrong_arrays_are_named_or_left_out(tmp_path, changes, message):
    write_bridge(tmp_path, "a/pick", changes=changes)
    write_bridge(tmp_path, "b/pick")
    with pytest.raises(DatasetError, match=rf"a/pick/.*obs_dict\.pkl: ({message})"):
        BridgeSource(tmp_path)
    source = BridgeSource(tmp_path, skip_damaged=True)
    assert len(source) == 1 and "obs_dict.pkl" in source.skipped["it is damaged"][0]


def test_arrays_that_are_missing(tmp_path):
    folder = write_bridge(tmp_path)
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps({"full_state": 1}))
    with pytest.raises(DatasetError, match=r"obs_dict\.pkl has no 'eef_transform'; it has full_state"):
        BridgeSource(tmp_path)
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(DatasetError, match="holds a list; expected a dict"):
        BridgeSource(tmp_path)


def test_default_instruction(tmp_path):
    write_bridge(tmp_path, "a/pick", label=None)
    write_bridge(tmp_path, "b/pick", label="asdfghjk")
    assert [episode.instruction for episode in BridgeSource(tmp_path)] == ["", ""]
    assert [episode.instruction for episode in BridgeSource(tmp_path, default_instruction="do it")] == ["do it", "do it"]
    folder = write_bridge(tmp_path, "c/pick")
    (folder / "lang.txt").write_bytes("poser la théière".encode("latin1") + b"\nput it down\n")
    assert BridgeSource(tmp_path)[2].instruction == "put it down"
    (folder / "lang.txt").write_text("put it up\n", encoding="utf-8-sig")
    assert BridgeSource(tmp_path)[2].instruction == "put it up"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("", ""),
        ("put the pot left", "put the pot left"),
        ("  put the  pot\tleft \nother line", "put the pot left"),
        ("confidence: 0.9\nput the pot left", "put the pot left"),  # first acceptable line
        ("none\nput the pot left", "put the pot left"),  # one word
        ("images did not load here\nput the pot left", "put the pot left"),
        ("the pictures aren't working", ""),
        ("no image to see", ""),
        ("take the can cardboard fence", "take the can"),
        ("take the can,put it down", "take the can, put it down"),
        ("take the can ,put it down", "take the can, put it down"),
        ("PUT the pot Left", "put the pot left"),
        ("put pot A to the Left", "put pot A to the Left"),  # a single capital is not shouted
        ("put it in 4fbox", "put it in  cardboard box"),
        ("put it in the1fbox", "put it in the cardboard box"),
        ("move the stuffedduck", "move the stuffed duck"),
        ("turn it clockwise90", "turn it clockwise 90 degrees"),
        ("move the bpttle", "move the bottle"),
        ("move the thng", "move the thing"),
        ("move it upawrds", "move it upwards"),
        ("sdfkl the pot", ""),
        ("sdfgh the pot", "sdfgh the pot"),  # gh is a pair of English words
        ("pick up sdlkfj\nput the pot left", "put the pot left"),
        ("at 12.34 left", ""),  # dots and digits count
        ("the strengths of knights", "the strengths of knights"),  # ng, th and gh do not
        ("try my rhythm", "try my rhythm"),  # y is a vowel here
        ("move it (does not mention the locations of the objects)", "move it"),
        ('"move the pot"', "move the pot"),
        ('move the "pot" left', ""),
        ("is it moved?", ""),
        ("https://www.youtube.com/watch?v=x y", ""),
        ("move ëë there", ""),
        ("déplacer la tasse", "déplacer la tasse"),  # other languages stay, as in the published labels
    ],
)
def test_labels(text, label):
    assert clean_label(text) == label


def test_images_are_turned_as_exif_says(tmp_path):
    folder, exif = write_bridge(tmp_path) / "images0", Image.Exif()
    exif[0x0112] = 6
    for path in folder.iterdir():
        stored = np.zeros((*SIZE, 3), np.uint8)
        stored[: SIZE[0] // 2] = 200
        Image.fromarray(stored).save(path, exif=exif)
    source = BridgeSource(tmp_path)
    assert source.image_size == SIZE[::-1]
    (seen,) = source[0].frames.take([1])
    assert seen[:, -8:].min() > 190 and seen[:, :8].max() < 10  # what was above is at the right


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    path = write_bridge(tmp_path) / "images0" / "im_2.jpg"
    Image.fromarray(np.full(SIZE, 1000, np.uint16)).save(path, "PNG")
    with pytest.raises(DatasetError, match=rf"{path} cannot be read: its pixels are of the mode I;16; expected 8 bits"):
        BridgeSource(tmp_path)[0].frames.take([1])
