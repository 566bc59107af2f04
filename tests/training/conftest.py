import jax
import jax.numpy as jnp
import pytest
from run_states import CONFIG

from mimic_video.training.steps import split_params
from mimic_video.vam import VideoActionModel


@pytest.fixture(scope="session")
def template():
    """(trained, frozen) parameters of stage `action`, all zero."""
    shapes = jax.eval_shape(VideoActionModel(CONFIG).init, jax.random.key(0))
    return split_params(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), CONFIG)
