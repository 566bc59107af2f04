import jax
import jax.numpy as jnp
import pytest
import tiny
from buckets import emulated_bucket
from run_states import CONFIG

from mimic_video.runs.storage import run_path
from mimic_video.stages import split_params


@pytest.fixture(scope="session")
def template():
    """(trained, frozen) parameters of stage `action`, all zero."""
    return split_params(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tiny.shapes(CONFIG)), CONFIG)


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as url:
        yield run_path(url)
