"""What can be known of programs for GPUs without one: whether they trace and lower under the rules of cuDNN's attention.

JAX refuses shapes, batching and gradients that cuDNN cannot do while a program is traced, so what fails here fails on every GPU.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from mimic_video.analysis import aot, forms
from mimic_video.config import ConfigError, MeshConfig
from mimic_video.models import attention as module
from mimic_video.models.attention import attention

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "launch"))
from shipped import EXPERIMENTS, all_shipped, shipped

H100, A100, T4 = (9, 0), (8, 0), (7, 5)


def kernels(function, *shapes, capability=H100):
    """Calls of cuDNN's attention in a function of arrays of those shapes."""
    with aot.as_on_gpu(capability):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@__cudnn$fmha")


def heads(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def gradient(q, k, v, mask=None):
    return jax.grad(lambda *heads: jnp.sum(attention(*heads, mask).astype(jnp.float32)), (0, 1, 2))(q, k, v)


@pytest.mark.full_size
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_step_of_every_experiment_lowers_for_a_gpu(name):
    """As shipped, on one device; its attention is cuDNN's, forward and backward."""
    config = shipped(name)
    train = dataclasses.replace(config.train, batch_size=config.train.micro_batches)
    data = config.data if name.startswith("quickstart") else dataclasses.replace(config.data, latents="x")
    config = dataclasses.replace(config, train=train, data=data, backbone_run="x")
    lowered = aot.lower_for_gpu(*aot.step_program(config, jax.devices()[:1]), H100)
    trained = {"video": {"forward": 4, "backward": 2}, "action": {"forward": 6, "backward": 2}}[config.stage]
    if config.precision == "float32":
        trained = {"forward": 0, "backward": 0}
    assert lowered.flash == trained
    assert lowered.arguments > 0 and list(lowered.largest) == sorted(lowered.largest, reverse=True)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("published:bridge", {"mesh": MeshConfig(sequence=2)}),
        ("published:bridge_video", {"mesh": MeshConfig(sequence=2)}),
        ("small:half_action", {"mesh": MeshConfig(fsdp=2)}),
        ("small:colab_video", {"mesh": MeshConfig(data=2)}),
    ],
)
def test_a_step_on_two_gpus_lowers(name, changes):
    """Two that share every sample's tokens, or its parameters, or nothing; the batch in parts where the experiment has parts."""
    config = dataclasses.replace(forms.narrow(shipped(name)), **changes)
    train = dataclasses.replace(config.train, batch_size=2 * config.train.batch_size)
    lowered = aot.lower_for_gpu(*aot.step_program(dataclasses.replace(config, train=train), jax.devices()[:2]), H100)
    assert lowered.flash["forward"] >= 4 and lowered.flash["backward"] == 2


STEPS = {name: config for name, config in forms.step_forms(all_shipped()) if name not in EXPERIMENTS}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_every_form_lowers(name):
    lowered = aot.lower_for_gpu(*aot.step_program(STEPS[name], jax.devices()[:1]), H100)
    assert (lowered.flash["backward"] == 2) == ("float32" not in name)


POLICIES = {name: rest for name, *rest in forms.policy_forms(shipped("published:bridge"))}


@pytest.mark.parametrize("experiment", ["published:bridge", pytest.param("published:libero", marks=pytest.mark.full_size)])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_every_form_lowers(name, experiment):
    """At the published size; 61 tokens of LIBERO's chunks are odd, and so are Bridge's 17 with a robot's own."""
    config, arguments = next(rest for other, *rest in forms.policy_forms(shipped(experiment)) if other == name)
    lowered = aot.lower_for_gpu(*aot.policy_program(config, jax.devices()[0], **arguments), H100)
    if "float32" in name:
        assert lowered.flash == {"forward": 0, "backward": 0}
    else:
        passes = 2 if "denoised" in name else 1  # of the backbone, whole and up to the block that is read
        guided = 2 if arguments.get("continuing") else 0
        assert lowered.flash == {"forward": 2 * passes + 2, "backward": guided}


# Attention.


@pytest.mark.parametrize(
    ("samples", "queries", "keys", "masked"),
    [
        (2, 64, 128, False),
        (2, 61, 128, False),
        (2, 64, 127, False),
        (8, 17, 128, False),
        (2, 61, 127, True),
        (6, 61, 127, True),
    ],
)
def test_gradients_of_any_lengths_lower(samples, queries, keys, masked):
    shapes = [heads(samples, queries, 4, 64), heads(2, keys, 4, 64), heads(2, keys, 4, 64)]
    assert kernels(gradient, *shapes, *([jax.ShapeDtypeStruct((2, keys), bool)] if masked else [])) == 2


def test_a_mask_costs_no_array_of_queries_by_keys():
    """At 19,200 tokens that would be 0.7 GB a sample, as a bias in bfloat16."""
    q = heads(1, 19_200, 16, 128)
    with aot.as_on_gpu(H100):
        jaxpr = jax.make_jaxpr(gradient)(q, q, q, jax.ShapeDtypeStruct((1, 19_200), bool))
    assert max(size for size, *_ in aot.largest_arrays(jaxpr.jaxpr)) <= 4 * 19_200 * 16 * 128


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        (H100, "float32", 64, "float32 (config field 'precision')"),
        (H100, "bfloat16", 60, "heads of 60"),
        (H100, "bfloat16", 264, "heads of 264"),
        (A100, "bfloat16", 256, "heads of 256"),
        (
            T4,
            "bfloat16",
            64,
            "compute capability 7.5, which has no bfloat16 either: config field 'precision' had better be 'float32",
        ),
        (T4, "float32", 64, "compute capability 7.5"),
        (None, "bfloat16", 64, "GPUs of an unknown compute capability"),
    ],
)
def test_what_cudnn_does_not_take_is_left_to_xla_and_said_once(capability, dtype, head_dim, reason, caplog):
    module.REFUSED.clear()
    q = heads(2, 64, 4, head_dim, dtype=jnp.dtype(dtype))
    with aot.as_on_gpu(capability), caplog.at_level("WARNING"):
        for time in range(2):
            jaxpr = jax.make_jaxpr(lambda q, time=time: gradient(q, q, q))(q)
            assert "dot_product_attention_fwd" not in str(jaxpr)
        if capability:
            with pytest.raises(ConfigError, match=r"'attention' is 'cudnn', which does not take .*; expected 'auto'"):
                jax.eval_shape(lambda q: attention(q, q, q, backend="cudnn"), q)
        else:  # who names it knows the GPU
            assert jax.eval_shape(lambda q: attention(q, q, q, backend="cudnn"), q).shape == q.shape
    said = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"attention by XLA: cudnn does not take {reason}")


@pytest.mark.parametrize(("capability", "calls"), [(H100, 2), (A100, 0)], ids=["H100", "A100"])
def test_heads_of_256_are_taken_where_the_chip_takes_them(capability, calls):
    q = heads(2, 64, 2, 256)
    assert kernels(lambda *heads: gradient(*heads), q, q, q, capability=capability) == calls
