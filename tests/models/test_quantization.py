import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import published
from mimic_video.config import experiment_from
from mimic_video.models.protocols import VideoInputs
from mimic_video.models.quantization import Int8Kernel, cast, dequantized, quantized


def test_every_weight_is_off_by_half_a_step_of_its_output_at_most():
    kernel = np.random.default_rng(0).standard_normal((3, 32, 8), np.float32) * np.geomspace(1e-3, 1e3, 8, dtype=np.float32)
    kernel[1, :, 4] = 0
    network = {"blocks": {"mlp": {"kernel": kernel, "scale": jnp.ones(8)}}, "final": {"kernel": kernel}}
    made = quantized(network)
    values, scale = made["blocks"]["mlp"]["kernel"]
    assert values.dtype == jnp.int8 and scale.shape == (3, 1, 8) and made["final"] is network["final"]
    restored = dequantized(made, jnp.float32)["blocks"]["mlp"]
    largest = np.abs(kernel).max(axis=1, keepdims=True)
    assert (np.abs(restored["kernel"] - kernel) <= largest / 254 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(restored["scale"], 1)
    chex.assert_trees_all_equal(quantized(made), made)
    assert cast(made, jnp.bfloat16)["blocks"]["mlp"]["kernel"].scale.dtype == jnp.float32


def test_a_network_computes_as_with_the_weights_that_its_integers_stand_for():
    config = tiny.experiment(policy={"weights": "int8"})
    vam = tiny.model(config)
    exact = {"backbone": tiny.params(config)["backbone"]}
    kept = vam.policy_params(exact)
    latents, times, text = jnp.ones((1, 1, 3, 4, 4, 16)), jnp.full((1, 3), 0.5), jnp.ones((1, 4, 8))
    inputs = VideoInputs(latents, times, text, jnp.zeros((1, 3)))

    def velocity(params):
        return jax.jit(lambda params: vam.module("backbone", params)(inputs))(params)

    plain = {"backbone": dequantized(kept["backbone"], jnp.float32)}
    np.testing.assert_allclose(velocity(kept), velocity(plain), rtol=1e-5, atol=1e-6)
    assert 0 < np.abs(velocity(kept) - velocity(exact)).max() < 0.05 * np.abs(velocity(exact)).max()


@pytest.mark.full_size
def test_the_published_policy_in_half_the_memory():
    """The tokenizer, the decoder and the embeddings stay as they are."""

    def gigabytes(weights):
        values = published.get_config("bridge")
        values.policy.weights = weights
        vam = tiny.model(experiment_from(values))
        shapes = jax.eval_shape(lambda: vam.policy_params(vam.init(jax.random.key(0))))
        assert isinstance(shapes["backbone"]["blocks"]["mlp"]["up"]["kernel"], Int8Kernel) == (weights == "int8")
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 1e9

    print(f"published policy: {gigabytes('exact'):.2f} GB in bfloat16, {gigabytes('int8'):.2f} GB with int8 weights")
    assert gigabytes("int8") < 0.7 * gigabytes("exact")
