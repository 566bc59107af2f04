"""Random training states, and runs that hold them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mimic_video.config import MeshConfig
from mimic_video.parallel.sharding import make_mesh, place
from mimic_video.runs import checkpoints
from mimic_video.training.steps import make_state

CONFIG = tiny.experiment()
DATA = {
    "next_step": 5,
    "phases": [[0, [1.0, 0.1]]],
    "datasets": {"one": {"windows": 12, "content": "ab"}, "two": {"windows": 9, "content": "cd"}},
}
ONE_DEVICE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def random_like(tree, seed):
    """The tree with other values: random floats, and integers counted up."""
    random = np.random.default_rng(seed)

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(leaf + seed)
        return jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(one, tree)


def state_of(template, seed, config=CONFIG, mesh=ONE_DEVICE):
    """A state after `seed` steps whose every array is random."""
    return place(random_like(make_state(config, template[0]), seed), mesh)


def saved(run, states, keep=3):
    with checkpoints.open_checkpoints(run, keep) as manager:
        for state in states:
            checkpoints.save(manager, state, DATA)
    return run


def assert_equal_bits(one, two):
    chex.assert_trees_all_equal_dtypes(one, two)
    chex.assert_trees_all_equal(one, two)
