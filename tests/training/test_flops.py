import dataclasses
import math

import jax
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from mimic_video.batch import Observation, batch_shapes
from mimic_video.config import ExperimentConfig, TokenizerConfig, TrainConfig
from mimic_video.stages import join_params, split_params
from mimic_video.training import flops

PUBLISHED = ExperimentConfig(stage="video", tokenizer=TokenizerConfig(kind="wan"), train=TrainConfig(batch_size=1))


def traced_flops(jaxpr) -> float:
    """Two operations for every multiply-add of the matrix products and convolutions in a program, loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [getattr(v.aval, "shape", None) for v in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape)
        if name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            total += 2 * outputs * math.prod(shapes[0][axis] for axis in contracted)
        if name == "conv_general_dilated":
            total += 2 * outputs * math.prod(shapes[1]) / shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
        repeats = equation.params.get("length", 1) if name == "scan" else 1
        total += repeats * sum(map(traced_flops, jaxprs_in_params(equation.params)))
    return total


def gradient(config: ExperimentConfig):
    """The gradient of a stage's loss, and shapes of its arguments."""
    vam = tiny.model(config)
    trained, frozen = jax.eval_shape(lambda: split_params(vam.init(jax.random.key(0)), config))

    def loss(trained, frozen, batch):
        draws = vam.draw(jax.random.key(0), config.train.batch_size)
        return vam.loss(join_params(trained, frozen, config), batch, draws)[0]

    return jax.grad(loss), (trained, frozen, batch_shapes(config, config.train.batch_size))


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "video"},
        {"stage": "action", "train": {"action_draws": 3}},
        {"stage": "action", "decoder": {"embodiments": 2}, "data": {"cameras": ("primary", "wrist")}},
        {"stage": "video", "data": {"latents": "there"}, "backbone_run": "there"},
        {"stage": "video", "lora": {"rank": 2}},
        {"stage": "video", "lora": {"rank": 2, "targets": ("q_proj", "mlp/up"), "trained": ()}},
        {"stage": "action", "lora": {"rank": 2, "targets": ("q_proj", "mlp"), "trained": ("final_modulation",)}},
    ],
    ids=["video", "several draws", "robots and views", "latents", "adapters", "few adapters", "adapted decoder"],
)
def test_the_count_is_that_of_the_traced_step(changes):
    config = tiny.experiment(**changes)
    counted = flops.step_flops(config)
    step, shapes = gradient(config)
    assert counted.model + counted.tokenizer == pytest.approx(traced_flops(jax.make_jaxpr(step)(*shapes).jaxpr), rel=1e-9)
    assert (counted.tokenizer == 0) == bool(config.data.latents)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": {"kind": "wan", "width": 4}},
        {"policy": {"stop_step": 2}},
        {"policy": {"stop_time": 0.9}},
        {"train": {"action_draws": 4}, "decoder": {"embodiments": 2}},
    ],
    ids=["one pass", "two steps before", "until a flow time", "robots"],
)
def test_a_policy_is_counted_as_traced(changes):
    config = tiny.experiment(**changes)
    data, decoder, counted = config.data, config.decoder, flops.policy_flops(config)
    params, robots = tiny.shapes(config), decoder.embodiments
    struct = jax.ShapeDtypeStruct
    shapes = (
        params,
        Observation(
            struct((1, config.text.rows, config.backbone.text_width), "float32"),
            struct((1, 1, data.past_frames, *data.image_size, 3), "uint8"),
            proprio=struct((1, 1, decoder.proprio_dim), "float32"),
            embodiment=struct((1,), "int32") if robots else None,
        ),
        jax.eval_shape(lambda: tiny.model(config).draw_noise(jax.random.key(0), 1)),
    )

    plan = tiny.model(config).sample_actions
    assert counted.total == pytest.approx(traced_flops(jax.make_jaxpr(plan)(*shapes).jaxpr), rel=1e-9)


def test_xla_counts_the_same_and_little_else():
    """In one block, since XLA counts the body of a loop once; its count has elementwise operations too."""
    config = tiny.experiment(
        stage="video",
        text={"rows": 64},
        train={"batch_size": 1},
        data={"image_size": (64, 128)},
        backbone={"width": 256, "num_blocks": 1, "text_width": 256, "hidden_block": 1, "mlp_ratio": 4.0},
    )
    step, shapes = gradient(config)
    counted = flops.step_flops(config)
    assert jax.jit(step).lower(*shapes).cost_analysis()["flops"] == pytest.approx(counted.model + counted.tokenizer, rel=0.05)


def test_the_wan_encoder_is_counted_as_traced():
    config = tiny.experiment(stage="video", tokenizer={"kind": "wan", "width": 4}, data={"image_size": (32, 48)})
    vam = tiny.model(config)
    params, shape = jax.eval_shape(vam.init, jax.random.key(0)), batch_shapes(config, 1).observation.video
    traced = traced_flops(jax.make_jaxpr(vam.encode_video)(params, shape).jaxpr)
    assert flops.step_flops(config).tokenizer == pytest.approx(traced, rel=1e-9)


def test_the_published_backbone_by_hand():
    """2B at 61 frames of 480x640: 16 latent frames of 30x40 tokens, 512 rows of text."""
    tokens, frames, width, text = 16 * 30 * 40, 16, 2048, 512
    assert flops.video_tokens(PUBLISHED) == tokens
    dense = tokens * (4 + 2 + 8) * width**2 + text * 2 * 1024 * width + 3 * frames * (width * 256 + 256 * 3 * width)
    attention = 2 * tokens**2 * width + 2 * tokens * text * width
    outside = tokens * (72 + 64) * width + 4 * frames * width**2 + frames * (width * 256 + 256 * 2 * width)
    forward = 2 * (28 * (dense + attention) + outside)
    assert sum(product.forward for product in flops.backbone_products(PUBLISHED, None)) == forward
    assert 1.50e14 < forward < 1.51e14
    counted = flops.step_flops(PUBLISHED)
    assert 2.998 * forward < counted.model < 3 * forward  # inputs of the first layers need no gradient
    assert counted.attention == 3 * 2 * 28 * attention


def test_the_frozen_backbone_is_run_once_up_to_where_it_is_read():
    def at(**train):
        return flops.step_flops(dataclasses.replace(PUBLISHED, stage="action", train=TrainConfig(batch_size=1, **train)))

    one, eight = at(), at(action_draws=8)
    assert one.backbone + one.backbone_attention == sum(p.forward for p in flops.backbone_products(PUBLISHED, 20))
    assert eight.backbone == one.backbone and eight.backbone_attention == one.backbone_attention
    assert eight.decoder_attention == 8 * one.decoder_attention
    assert one.decoder < eight.decoder < 1.2 * one.decoder  # most of it are keys and values of the context


def test_utilisation_is_of_known_chips_only():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    kinds = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H200": 989e12,
    }
    assert all(flops.mfu(peak, 2 * [Device(kind)]) == 0.5 for kind, peak in kinds.items())
    assert flops.mfu(1e12, jax.devices()) is None
