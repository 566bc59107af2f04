import dataclasses

import flops_by_hand
import jax
import jax.numpy as jnp
import pytest
import tiny

from mimic_video.analysis.policy_flops import policy_flops
from mimic_video.models.devices import PAPER, assuming
from mimic_video.models.protocols import VideoInputs
from mimic_video.training.flops import products, video_tokens


@pytest.mark.full_size
@pytest.mark.parametrize("name", flops_by_hand.COUNTED["policies"])
def test_policies_of_shipped_experiments_are_as_counted_by_hand(name):
    found = policy_flops(flops_by_hand.experiment(name))
    assert dataclasses.asdict(found) == flops_by_hand.COUNTED["policies"][name]
    assert found.total == found.encode + found.video + found.context + found.steps


@pytest.mark.parametrize(
    ("policy", "passes"),
    [({}, 0), ({"stop_step": 2}, 2), ({"stop_time": 0.9}, 2)],
    ids=["one pass", "steps", "until a flow time"],
)
def test_a_policy_by_hand(policy, passes):
    """Two of the backbone's blocks at a whole pass, one at the last; two of the decoder."""
    config = tiny.experiment(policy=policy, train={"action_draws": 4}, attention="cudnn", precision="bfloat16")
    vam, found = tiny.model(config), policy_flops(config)
    latents = jax.eval_shape(lambda: vam.draw_noise(jax.random.key(0), 1)["video"])
    frames = (1, latents.shape[2])
    text = (1, config.text.rows, config.backbone.text_width)
    inputs = VideoInputs(latents, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (frames, text, frames)))

    def pass_of(**stop):
        def run(params, inputs):
            backbone = vam.module("backbone", params)
            return backbone.hidden(inputs, **stop) if stop else backbone(inputs)

        with assuming(PAPER):
            return products(jax.make_jaxpr(run)(vam.shapes, inputs).jaxpr).total()

    assert found.video == passes * pass_of() + pass_of(stop=1)
    backbone, decoder = config.backbone.width, config.decoder.width
    assert found.context == 2 * video_tokens(vam) * backbone * 2 * decoder * 2


def test_the_bits_of_its_weights_change_nothing():
    eight = tiny.experiment(policy={"weights": "int8"}, decoder={"embodiments": 2})
    assert policy_flops(eight) == policy_flops(tiny.experiment(decoder={"embodiments": 2}))
