"""What was saved on one mesh, used on others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from run_states import DATA, assert_equal_bits, random_like

from mimic_video.config import MeshConfig
from mimic_video.parallel.sharding import global_batch, make_mesh, place, shardings
from mimic_video.runs import checkpoints, directory
from mimic_video.stages import split_params
from mimic_video.training.steps import abstract_state, make_state, make_train_step

MESHES = {
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "data=2, fsdp=4": MeshConfig(data=2, fsdp=4),
    "fsdp=2, sequence=4": MeshConfig(data=1, fsdp=2, sequence=4),
    "one device": MeshConfig(data=1),
}


def mesh_of(name):
    return make_mesh(MESHES[name], jax.devices()[: 1 if name == "one device" else 8])


# Every dimension that is split is a multiple of eight, and four sequence parts share four heads.
CONFIG = tiny.experiment(stage="video", backbone={"width": 32, "num_heads": 4, "adaln_lora_dim": 8})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, state in it, frozen parameters), saved on eight devices."""
    run, mesh = tmp_path_factory.mktemp("meshes") / "run", mesh_of("fsdp=8")
    directory.write_config(run, CONFIG)
    params, frozen = split_params(tiny.params(CONFIG), CONFIG)
    state = place(make_state(CONFIG, params), mesh)
    state = state.replace(opt_state=place(jax.tree.map(jnp.abs, random_like(state.opt_state, 7)), mesh))
    checkpoints.save_frozen(run, frozen)
    with checkpoints.open_checkpoints(run, 1) as manager:
        checkpoints.save(manager, state, DATA)
    return run, jax.device_get(state), frozen


@pytest.mark.training
def test_a_run_saved_on_eight_devices_continues_on_any_mesh(run):
    (folder, saved, kept), vam, losses = run, tiny.model(CONFIG), {}
    for name in MESHES:
        mesh = mesh_of(name)
        target = abstract_state(vam, mesh)
        with checkpoints.open_checkpoints(folder, 1) as manager:
            state = checkpoints.restore(manager, target)
        frozen = checkpoints.load_frozen(folder, mesh=mesh)
        assert_equal_bits(state, saved)
        assert_equal_bits(frozen, kept)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, target)
        _, metrics = make_train_step(vam, mesh, state)(state, frozen, global_batch(tiny.batch(CONFIG, 8), mesh))
        losses[name] = float(metrics["loss"])
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, losses["fsdp=8"], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("precision", ["configured", "stored"])
def test_parameters_come_straight_into_a_mesh(run, precision):
    (folder, saved, kept), mesh = run, mesh_of("data=2, fsdp=4")
    params, _ = checkpoints.load_params(folder, precision, mesh)
    assert_equal_bits(params, kept | saved.ema)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings(params, mesh)
