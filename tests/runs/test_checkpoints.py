import shutil

import jax
import numpy as np
import pytest
import tiny
from run_states import CONFIG, DATA, assert_equal_bits, random_like, saved, state_of

from mimic_video.config import MeshConfig
from mimic_video.parallel.sharding import make_mesh
from mimic_video.runs import checkpoints, directory
from mimic_video.stages import join_params, split_params
from mimic_video.training.steps import abstract_state
from mimic_video.trees import named_leaves


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_a_state_comes_back_bit_for_bit(tmp_path, template, ema_decay):
    config = tiny.experiment(train={"ema_decay": ema_decay})
    state = state_of(template, 5, config)
    assert bool(state.ema) == (ema_decay > 0)
    saved(tmp_path, [state])
    with checkpoints.open_checkpoints(tmp_path, 3) as manager:
        restored = checkpoints.restore(manager, state_of(template, 1, config))
    assert int(restored.step) == 5
    assert_equal_bits(restored, state)


@pytest.mark.training
def test_a_state_restored_onto_another_mesh(tmp_path, template):
    state = state_of(template, 5, mesh=make_mesh(MeshConfig(data=8)))
    saved(tmp_path, [state])
    target = abstract_state(tiny.model(CONFIG), make_mesh(MeshConfig(data=2, fsdp=4)))
    with checkpoints.open_checkpoints(tmp_path, 3) as manager:
        restored = checkpoints.restore(manager, target)
    assert_equal_bits(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, target)
    kernel = restored.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] * 4 == kernel.shape[1]


def test_the_newest_checkpoint_is_restored_and_old_ones_go(tmp_path, template):
    states = [state_of(template, step) for step in (2, 4, 6)]
    saved(tmp_path, states, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    with checkpoints.open_checkpoints(tmp_path, 2) as manager:
        assert_equal_bits(checkpoints.restore(manager, states[0]), states[2])


def test_no_checkpoint(tmp_path, template):
    with checkpoints.open_checkpoints(tmp_path, 3) as manager:
        assert checkpoints.restore(manager, state_of(template, 1)) is None


def test_a_checkpoint_that_a_kill_left_unfinished_is_not_one(tmp_path, template):
    state = state_of(template, 2)
    saved(tmp_path, [state])
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-123").mkdir()
    with checkpoints.open_checkpoints(tmp_path, 3) as manager:
        assert int(checkpoints.restore(manager, state).step) == 2


def test_the_data_have_to_be_those_of_the_checkpoint(tmp_path, template):
    def check(**datasets):
        with checkpoints.open_checkpoints(tmp_path, 3) as manager:
            checkpoints.require_same_data(manager, lambda step: DATA | {"next_step": step, "datasets": datasets})

    one, two = DATA["datasets"]["one"], DATA["datasets"]["two"]
    check(any={"windows": 0})  # there is no checkpoint yet
    saved(tmp_path, [state_of(template, 5)])
    check(one=one, two=two)
    with pytest.raises(directory.RunError, match=r"datasets\.two\.windows: 9 → 8") as error:
        check(one=one, two=two | {"windows": 8})
    assert str(tmp_path) in str(error.value) and "one" not in str(error.value) and "content" not in str(error.value)
    with pytest.raises(directory.RunError, match=r"datasets\.one\.content: 'ab' → 'ef'"):
        check(one=one | {"content": "ef"}, two=two)
    with pytest.raises(directory.RunError, match=r"datasets\.two\.windows: 9 → None"):
        check(one=one)
    with pytest.raises(directory.RunError, match=r"datasets\.three\.windows: None → 3"):
        check(one=one, two=two, three={"windows": 3})


def test_a_checkpoint_from_before_the_item_data_continues_with_a_warning(tmp_path, template, caplog):
    state = state_of(template, 5)
    saved(tmp_path, [state])
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "data")
    with checkpoints.open_checkpoints(tmp_path, 3) as manager, caplog.at_level("WARNING", logger="absl"):
        checkpoints.require_same_data(manager, lambda step: DATA)
        assert_equal_bits(checkpoints.restore(manager, state), state)
    assert f"{tmp_path} does not say what data it was trained on" in caplog.text


def test_frozen_parameters_are_those_of_the_last_start(tmp_path, template):
    directory.write_config(tmp_path, CONFIG)
    with pytest.raises(directory.RunError, match="has no frozen parameters: its training has not started"):
        checkpoints.load_frozen(tmp_path)
    checkpoints.save_frozen(tmp_path, random_like(template[1], 2))
    frozen = random_like(template[1], 1)
    assert set(frozen) == {"tokenizer", "backbone"}
    checkpoints.save_frozen(tmp_path, frozen)
    assert_equal_bits(checkpoints.load_frozen(tmp_path), frozen)


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_parameters_for_inference(tmp_path, template, ema_decay):
    config = tiny.experiment(train={"ema_decay": ema_decay})
    directory.write_config(tmp_path, config)
    frozen = random_like(template[1], 1)
    checkpoints.save_frozen(tmp_path, frozen)
    with pytest.raises(directory.RunError, match="has no complete checkpoint"):
        checkpoints.load_params(tmp_path)
    state = state_of(template, 4, config, make_mesh(MeshConfig(data=2, fsdp=4)))
    saved(tmp_path, [state_of(template, 2, config), state])
    params, step = checkpoints.load_params(tmp_path)
    assert step == 4
    assert_equal_bits(params, jax.device_get(frozen | (state.ema if ema_decay else state.params)))
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(params))


def test_checkpoints_of_round_steps_are_kept_for_good(tmp_path, template):
    with checkpoints.open_checkpoints(tmp_path, keep=1, keep_every=4) as manager:
        for step in range(2, 12, 2):
            checkpoints.save(manager, state_of(template, step), DATA)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10]


@pytest.mark.training
def test_adapters_are_merged_into_the_parameters_for_inference_on_any_mesh(tmp_path):
    config = tiny.experiment(lora={"rank": 2})
    directory.write_config(tmp_path, config)
    trained, frozen = split_params(random_like(tiny.params(config), 3), config)
    checkpoints.save_frozen(tmp_path, frozen)
    state = state_of((trained, frozen), 4, config)
    assert set(state.ema) == {"decoder", "lora"}
    saved(tmp_path, [state])
    expected = named_leaves(jax.device_get(join_params(state.ema, frozen, config)))
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=4))):
        found = named_leaves(checkpoints.load_params(tmp_path, mesh=mesh)[0])
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
            assert len(leaf.sharding.device_set) == (8 if mesh else 1)
