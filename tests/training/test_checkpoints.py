import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.training import checkpoints
from mimic_video.training.sharding import make_mesh
from mimic_video.training.steps import abstract_state, make_state, place, split_params
from mimic_video.vam import VideoActionModel

CONFIG = tiny.experiment()
DATA = {"next_step": 5, "phases": [[0, [1.0, 0.1]]],
        "datasets": {"one": {"windows": 12, "content": "ab"}, "two": {"windows": 9, "content": "cd"}}}  # fmt: skip
ONE_DEVICE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def random_like(tree, seed):
    """The tree with other values: random floats, and integers counted up."""
    random = np.random.default_rng(seed)

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(leaf + seed)
        return jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(one, tree)


@pytest.fixture(scope="module")
def template():
    shapes = jax.eval_shape(VideoActionModel(CONFIG).init, jax.random.key(0))
    return split_params(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), CONFIG)


def state_of(template, seed, config=CONFIG, mesh=ONE_DEVICE):
    """A state after `seed` steps whose every array is random."""
    return place(random_like(make_state(config, template[0]), seed), mesh)


def saved(run, states, keep=3):
    with checkpoints.open_checkpoints(run, keep) as manager:
        for state in states:
            checkpoints.save(manager, state, DATA)
    return run


def assert_equal_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


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


def test_a_state_restored_onto_another_mesh(tmp_path, template):
    state = state_of(template, 5, mesh=make_mesh(MeshConfig(data=8)))
    saved(tmp_path, [state])
    target = abstract_state(VideoActionModel(CONFIG), make_mesh(MeshConfig(data=2, fsdp=4)))
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
    with pytest.raises(checkpoints.RunError, match=r"datasets\.two\.windows: 9 → 8") as error:
        check(one=one, two=two | {"windows": 8})
    assert str(tmp_path) in str(error.value) and "one" not in str(error.value) and "content" not in str(error.value)
    with pytest.raises(checkpoints.RunError, match=r"datasets\.one\.content: 'ab' → 'ef'"):
        check(one=one | {"content": "ef"}, two=two)
    with pytest.raises(checkpoints.RunError, match=r"datasets\.two\.windows: 9 → None"):
        check(one=one)
    with pytest.raises(checkpoints.RunError, match=r"datasets\.three\.windows: None → 3"):
        check(one=one, two=two, three={"windows": 3})


def test_a_checkpoint_from_before_the_item_data_continues_with_a_warning(tmp_path, template, caplog):
    state = state_of(template, 5)
    saved(tmp_path, [state])
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "data")
    with checkpoints.open_checkpoints(tmp_path, 3) as manager, caplog.at_level("WARNING", logger="absl"):
        checkpoints.require_same_data(manager, lambda step: DATA)
        assert_equal_bits(checkpoints.restore(manager, state), state)
    assert f"{tmp_path} does not say what data it was trained on" in caplog.text


def test_frozen_parameters_are_kept_once(tmp_path, template):
    checkpoints.write_config(tmp_path, CONFIG)
    with pytest.raises(checkpoints.RunError, match="has no frozen parameters: its training has not started"):
        checkpoints.load_frozen(tmp_path)
    frozen = random_like(template[1], 1)
    assert set(frozen) == {"tokenizer", "backbone"}
    checkpoints.save_frozen(tmp_path, frozen)
    checkpoints.save_frozen(tmp_path, random_like(template[1], 2))
    assert_equal_bits(checkpoints.load_frozen(tmp_path), frozen)


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_parameters_for_inference(tmp_path, template, ema_decay):
    config = tiny.experiment(train={"ema_decay": ema_decay})
    checkpoints.write_config(tmp_path, config)
    frozen = random_like(template[1], 1)
    checkpoints.save_frozen(tmp_path, frozen)
    with pytest.raises(checkpoints.RunError, match="has no complete checkpoint"):
        checkpoints.load_params(tmp_path)
    state = state_of(template, 4, config, make_mesh(MeshConfig(data=2, fsdp=4)))
    saved(tmp_path, [state_of(template, 2, config), state])
    params, step = checkpoints.load_params(tmp_path)
    assert step == 4
    assert_equal_bits(params, jax.device_get(frozen | (state.ema if ema_decay else state.params)))
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(params))


def test_configuration_of_a_run(tmp_path):
    run = tmp_path / "runs" / "one"
    with pytest.raises(checkpoints.RunError, match=r"one is not a run directory: it has no config\.json"):
        checkpoints.read_config(run)
    checkpoints.write_config(run, CONFIG)
    assert checkpoints.read_config(run) == CONFIG
    checkpoints.write_config(run, CONFIG)


def test_what_a_run_may_not_change_is_listed(tmp_path):
    checkpoints.write_config(tmp_path, CONFIG)
    changed = tiny.experiment(seed=3, train={"learning_rate": 0.5}, data={"video_hz": 5.0}, mesh={"fsdp": 2})
    with pytest.raises(ConfigError) as error:
        checkpoints.write_config(tmp_path, changed)
    for difference in ("seed: 0 → 3", "train.learning_rate: 0.001 → 0.5", "data.video_hz: 10.0 → 5.0", str(tmp_path)):
        assert difference in str(error.value)
    assert "mesh" not in str(error.value) and "train.steps" not in str(error.value)
    assert checkpoints.read_config(tmp_path) == CONFIG


def test_what_a_run_may_change_is_recorded(tmp_path):
    checkpoints.write_config(tmp_path, CONFIG)
    changed = tiny.experiment(train={"log_every": 7, "checkpoint_every": 9, "keep_checkpoints": 1}, mesh={"fsdp": 2},
                              policy={"stop_step": 2}, evaluation={"max_steps": 9})  # fmt: skip
    checkpoints.write_config(tmp_path, changed)
    assert checkpoints.read_config(tmp_path) == changed


def test_weights_of_another_model(tmp_path):
    other = tiny.experiment(backbone={"width": 32, "num_blocks": 3}, text={"rows": 9}, decoder={"width": 32}, seed=4)
    checkpoints.require_same_model(CONFIG, other, ("data.image_size", "tokenizer"), tmp_path)
    with pytest.raises(ConfigError) as error:
        checkpoints.require_same_model(CONFIG, other, ("text", "backbone"), tmp_path)
    for name, now, there in (("backbone.width", 32, 16), ("backbone.num_blocks", 3, 2), ("text.rows", 9, 4)):
        assert f"'{name}' is {now}, there {there}" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "decoder" not in str(error.value) and "seed" not in str(error.value)
    same = dataclasses.replace(CONFIG, seed=9, train=dataclasses.replace(CONFIG.train, steps=99))
    checkpoints.require_same_model(CONFIG, same, ("data", "text", "backbone", "decoder", "tokenizer"), tmp_path)
