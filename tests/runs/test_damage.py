"""Checkpoints that are not what was written: training goes back to the one before, inference says what to do."""

import contextlib
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tensorstore
from run_states import CONFIG, assert_equal_bits, random_like, saved, state_of

from mimic_video.runs import checkpoints, directory
from mimic_video.runs.arrays import DamagedError, load_tree


def array_middles(item):
    """(file, position of the middle byte) of each array of an item but the smallest, which lie beside the names. Not all of
    their files is read: saving leaves behind what it has replaced."""
    store = tensorstore.KvStore.open(f"file://{item}/").result()
    root = tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]
    entries = tensorstore.ocdbt.dump(store, root).result()["entries"]
    places = [entry["indirect_value"].split(":")[1:] for entry in entries if "indirect_value" in entry]
    return [(item / folder / name, int(first) + int(size) // 2) for folder, name, first, size in places]


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)


def flip_data(checkpoint):
    text = (checkpoint / "data" / "metadata").read_text()
    (checkpoint / "data" / "metadata").write_text(text.replace('"windows": 9', '"windows": 8'))


DAMAGE = {
    "truncated array file": lambda checkpoint: os.truncate(*array_middles(checkpoint / "params")[-1]),
    "deleted array file": lambda checkpoint: array_middles(checkpoint / "train_state")[0][0].unlink(),
    "flipped byte": lambda checkpoint: flip(*array_middles(checkpoint / "ema")[0]),
    "missing item": lambda checkpoint: shutil.rmtree(checkpoint / "params"),
    "missing train state": lambda checkpoint: shutil.rmtree(checkpoint / "train_state"),
    "damaged metadata": lambda checkpoint: (checkpoint / "params" / "_METADATA").write_text('{"tree'),
    "empty metadata": lambda checkpoint: (checkpoint / "train_state" / "_METADATA").write_text("{}"),
    "no metadata": lambda checkpoint: (checkpoint / "params" / "_METADATA").unlink(),
    "damaged manifest": lambda checkpoint: flip(checkpoint / "params" / "manifest.ocdbt", 20),
    "changed data": flip_data,
    "data cut short": lambda checkpoint: (checkpoint / "data" / "metadata").write_text('{"data": {'),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, template):
    """A run with checkpoints 2 and 4."""
    run = tmp_path_factory.mktemp("damage") / "run"
    directory.write_config(run, CONFIG)
    checkpoints.save_frozen(run, random_like(template[1], 1))
    return saved(run, [state_of(template, 2), state_of(template, 4)])


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def restored(run, template, **changes):
    with checkpoints.open_checkpoints(run, 3) as manager:
        return checkpoints.restore(manager, state_of(template, 1, **changes))


@pytest.mark.parametrize("kind", DAMAGE)
def test_training_continues_from_the_checkpoint_before_a_damaged_one(copied, template, caplog, kind):
    DAMAGE[kind](copied / "checkpoints" / "4")
    with caplog.at_level("ERROR", logger="absl"):
        assert_equal_bits(restored(copied, template), state_of(template, 2))
    errors = [record.getMessage() for record in caplog.records if record.name == "absl"]  # asyncio tells of other readers' too
    assert len(errors) == 1 and "is damaged" in errors[0]
    assert f"moved to {copied}/checkpoints/4.damaged, and training continues from step 2" in errors[0]
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "4.damaged"]
    saved(copied, [state_of(template, 4)])  # the step may come again
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "4", "4.damaged"]


def test_no_flipped_byte_is_taken_for_what_was_written(run, tmp_path, template):
    target = state_of(template, 4).ema
    item = shutil.copytree(run / "checkpoints" / "4" / "ema", tmp_path / "ema")
    arrays = array_middles(item)
    assert len(arrays) > 12
    for file, middle in arrays:
        flip(file, middle)
        with pytest.raises(DamagedError):
            load_tree(item, target)
        flip(file, middle)
    for where in np.random.default_rng(0).integers(0, file.stat().st_size, 24).tolist():
        flip(file, where)
        with contextlib.suppress(DamagedError):
            assert_equal_bits(load_tree(item, target), target)  # of a byte that nothing depends on
        flip(file, where)


def test_arrays_that_can_be_read_but_are_others_are_noticed(copied, template):
    item = copied / "checkpoints" / "4" / "params"
    metadata = (item / "_METADATA").read_bytes()
    shutil.rmtree(item)
    shutil.copytree(copied / "checkpoints" / "2" / "params", item)
    (item / "_METADATA").write_bytes(metadata)
    with pytest.raises(DamagedError, match=r"fingerprints of decoder/.* are not those that were written"):
        load_tree(item, state_of(template, 1).params)


def test_arrays_without_fingerprints_are_read_with_a_warning(copied, template, caplog):
    item = copied / "checkpoints" / "4" / "params"
    metadata = json.loads((item / "_METADATA").read_text())
    (item / "_METADATA").write_text(json.dumps(metadata | {"custom_metadata": None}))
    with caplog.at_level("WARNING", logger="absl"):
        assert_equal_bits(load_tree(item, state_of(template, 1).params), state_of(template, 4).params)
    assert f"{item} was written without fingerprints" in caplog.text


def test_if_every_checkpoint_is_damaged_all_are_named_and_none_is_moved(copied, template):
    for step in ("2", "4"):
        shutil.rmtree(copied / "checkpoints" / step / "params")
    with pytest.raises(directory.RunError, match=r"no checkpoint of .* can be used") as error:
        restored(copied, template)
    assert all(f"checkpoints/{step}/params is damaged" in str(error.value) for step in (2, 4))
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "4"]


def test_another_models_checkpoint_is_an_error_and_stays_where_it_is(copied, template):
    other = jax.tree.map(lambda leaf: leaf, template[0])
    other["decoder"]["blocks"]["mlp"]["up"]["kernel"] = np.zeros((3, 16, 32), np.float32)
    other["decoder"]["newer"] = {"scale": np.zeros(3, np.float32)}
    with pytest.raises(directory.RunError, match="holds arrays of another model") as error:
        restored(copied, (other,))
    assert "decoder/blocks/mlp/up/kernel has shape (2, 16, 32) there, (3, 16, 32) here" in str(error.value)
    assert "decoder/newer/scale is not there" in str(error.value)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "4"]


def test_inference_names_the_damaged_checkpoint_and_how_to_use_the_one_before(copied, template):
    newest = copied / "checkpoints" / "4"
    (newest / "ema" / "_METADATA").write_text("{")
    with pytest.raises(directory.RunError, match=r"4/ema is damaged: .*; to use that of step 2 instead: mv ") as error:
        checkpoints.load_params(copied)
    assert newest.exists()
    old, new = str(error.value).split("mv ")[1].split()
    os.rename(old, new)
    params, step = checkpoints.load_params(copied)
    assert step == 2
    assert_equal_bits(params["decoder"], state_of(template, 2).ema["decoder"])


def test_damaged_frozen_parameters_are_an_error_that_names_them(copied):
    os.truncate(*array_middles(copied / "frozen")[-1])
    with pytest.raises(directory.RunError, match="run/frozen is damaged: "):
        checkpoints.load_frozen(copied)
