import dataclasses

import flops_by_hand
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx
from jax.experimental import pallas
from jax.sharding import PartitionSpec

from mimic_video.batch import batch_shapes
from mimic_video.config import ExperimentConfig, TokenizerConfig, TrainConfig
from mimic_video.models import attention as attention_module
from mimic_video.models.attention import attention
from mimic_video.models.devices import PAPER, assuming
from mimic_video.models.protocols import VideoInputs
from mimic_video.stages import join_params, split_params
from mimic_video.training.flops import products, step_flops, video_tokens
from mimic_video.vam import Conditioning, VideoActionModel

PUBLISHED = ExperimentConfig(stage="video", tokenizer=TokenizerConfig(kind="wan"), train=TrainConfig(batch_size=1))


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted(function, *arguments) -> int:
    return products(jax.make_jaxpr(function)(*arguments).jaxpr).total()


# Programs of any kind.


def test_a_network_made_up_here_is_counted_as_by_hand():
    """Both layers once forward and once for each weight, and the second once for its input: the first's needs no gradient."""

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up, self.down = nnx.Linear(3, 32, rngs=rngs), nnx.Linear(32, 7, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    graphdef, state = nnx.split(nnx.eval_shape(Network, nnx.Rngs(0)))

    def loss(state, x):
        return jnp.sum(nnx.merge(graphdef, state)(x) ** 2)

    assert counted(loss, state, shape(5, 3)) == 2 * 5 * (3 * 32 + 32 * 7)
    assert counted(jax.grad(loss), state, shape(5, 3)) == 2 * 5 * (2 * 3 * 32 + 3 * 32 * 7)


def test_products_of_batches():
    assert counted(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shape(4, 2, 3), shape(4, 5, 3)) == 2 * 4 * 2 * 5 * 3
    assert counted(jax.vmap(jnp.dot), shape(4, 3), shape(4, 3)) == 2 * 4 * 3
    assert counted(jnp.add, shape(4, 3), shape(4, 3)) == 0


def turned(x, matrix, times):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ matrix), None), x, length=times)[0]


ONE = 2 * 2 * 8 * 8  # operations of (2, 8) · (8, 8)


def test_loops_count_as_often_as_they_run():
    x, matrix = shape(2, 8), shape(8, 8)
    assert counted(lambda x, m: turned(x, m, 5), x, matrix) == 5 * ONE
    assert counted(jax.grad(lambda x, m: turned(x, m, 5).sum(), argnums=(0, 1)), x, matrix) == 3 * 5 * ONE
    twice = jax.jit(lambda x, m: jax.lax.map(lambda x: turned(x, m, 5), x))
    assert counted(twice, shape(3, 2, 8), matrix) == 3 * 5 * ONE
    assert counted(lambda x, m: jax.lax.fori_loop(0, 4, lambda _, x: x @ m, x), x, matrix) == 4 * ONE


def test_a_loop_of_unknown_length_is_refused_if_it_has_products():
    def until_small(step):
        return lambda x, m: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: step(x, m), x)

    assert counted(until_small(lambda x, m: x - m[:2]), shape(2, 8), shape(8, 8)) == 0
    with pytest.raises(ValueError, match="a `while` loop has products, and nothing says how often it runs; expected a scan"):
        counted(until_small(jnp.matmul), shape(2, 8), shape(8, 8))


def test_of_branches_the_dearest_counts():
    def either(choice, x, m):
        return jax.lax.cond(choice, lambda: x @ m @ m, lambda: x @ m)

    assert counted(either, shape(dtype="bool"), shape(2, 8), shape(8, 8)) == 2 * ONE


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable"])
def test_what_is_computed_again_does_not_count(policy):
    """Of a function alone, of a loop, and of a loop's body."""
    policy = getattr(jax.checkpoint_policies, policy)

    def block(x, m):
        return jnp.tanh(jnp.tanh(x @ m) @ m)

    def looped(block):
        return lambda x, m: jax.lax.scan(lambda x, _: (block(x, m), None), x, length=5)[0]

    kept, again = block, jax.checkpoint(block, policy=policy)
    for plain, remat in (
        (kept, again),
        (looped(kept), jax.checkpoint(looped(kept), policy=policy)),
        (looped(kept), looped(again)),
    ):
        gradients = [jax.grad(lambda x, m, f=f: f(x, m).sum(), argnums=(0, 1)) for f in (plain, remat)]
        needed, found = (counted(gradient, shape(2, 8), shape(8, 8)) for gradient in gradients)
        assert found == needed == 3 * counted(plain, shape(2, 8), shape(8, 8)) > 0


def test_gradients_of_ones_own_count_as_they_are_written():
    @jax.custom_vjp
    def product(x, m):
        return x @ m

    product.defvjp(lambda x, m: (x @ m, (x, m)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g @ saved[1]))
    assert counted(product, shape(2, 8), shape(8, 8)) == ONE
    gradient = jax.grad(lambda x, m: product(x, m).sum(), argnums=(0, 1))
    assert counted(gradient, shape(2, 8), shape(8, 8)) == 3 * ONE + 2 * 8**3


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_convolutions(stride, groups):
    """Zeros around a picture count; those that a gradient puts between the pixels of a wide stride do not."""

    def convolve(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides, padding = (stride, stride), ((1, 1), (1, 1)) if stride == 1 else ((0, 1), (0, 1))
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions, feature_group_count=groups)

    x, kernel = shape(2, 8, 12, 4), shape(3, 3, 4 // groups, 16)
    forward = 2 * 2 * (8 // stride) * (12 // stride) * 9 * (4 // groups) * 16
    assert counted(convolve, x, kernel) == forward
    assert counted(jax.grad(lambda *given: convolve(*given).sum(), argnums=(0, 1)), x, kernel) == 3 * forward


def test_what_runs_on_every_device_counts_for_all_of_them():
    mesh = jax.make_mesh((4, 2), ("data", "rest"), axis_types=2 * (jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("data"), None), out_specs=PartitionSpec("data"), axis_names={"data"}
    )
    assert counted(jax.jit(spread), shape(16, 8), shape(8, 8)) == 8 * ONE


def test_kernels_count_at_every_point_of_their_grid():
    def kernel(x, m, out):
        out[...] = x[...] @ m[...]

    def call(x, m):
        blocks = pallas.BlockSpec((2, 8), lambda i: (i, 0))
        whole = pallas.BlockSpec((8, 8), lambda i: (0, 0))
        return pallas.pallas_call(kernel, shape(6, 8), grid=(3,), in_specs=[blocks, whole], out_specs=blocks)(x, m)

    assert counted(call, shape(6, 8), shape(8, 8)) == 3 * ONE


def test_scopes_tell_products_apart():
    """In loops and gradients too, where the outermost counts."""

    @jax.named_scope("inner")
    def inner(x, m):
        return turned(x, m, 3)

    def outer(x, m):
        with jax.named_scope("outer"):
            x = jax.lax.scan(lambda x, _: (inner(x, m), None), x, length=2)[0]
            x = inner(x, m)
        return (inner(x, m) @ m).sum()

    jaxpr = jax.make_jaxpr(jax.grad(outer, argnums=(0, 1)))(shape(2, 8), shape(8, 8)).jaxpr
    assert products(jaxpr, ("outer", "inner")) == {"outer": 3 * 9 * ONE, "inner": 3 * 3 * ONE, "": 3 * ONE}
    assert products(jaxpr, ("inner", "outer")) == products(jaxpr, ("outer", "inner"))
    assert products(jaxpr, ("inner",)) == {"inner": 3 * 12 * ONE, "": 3 * ONE}
    assert products(jaxpr) == {"": 3 * 13 * ONE}


# The model.


@pytest.mark.parametrize("backend", ["auto", "xla", "cudnn", "splash"])
def test_on_paper_attention_is_its_products(monkeypatch, backend):
    """Not in parts, the last of which is padded; nor does any kernel stand for them."""
    monkeypatch.setattr(attention_module, "_LOGITS_BYTES", 16 * 2 * 2 * 70 * 4)
    q, k = shape(2, 40, 2, 4), shape(2, 70, 2, 4)

    def attend(q, k, v):
        return attention(q, k, v, backend=backend).sum()

    with assuming(PAPER):
        gradient = jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(q, k, k).jaxpr
    assert products(gradient, ("attention",)) == {"attention": 3 * 2 * (2 * 2 * 40 * 70 * 8)}
    if backend == "xla":
        assert (
            counted(jax.grad(lambda *given: attend(*given), argnums=(0, 1, 2)), q, k, k) == products(gradient).total() * 48 / 40
        )


@pytest.mark.full_size
@pytest.mark.parametrize("name", flops_by_hand.COUNTED["steps"])
def test_steps_of_shipped_experiments_are_as_counted_by_hand(name):
    vam, by_hand = VideoActionModel(flops_by_hand.experiment(name)), flops_by_hand.COUNTED["steps"][name]
    found = step_flops(vam)
    assert video_tokens(vam) == by_hand["tokens"]
    assert found.tokenizer == by_hand["tokenizer"] and found.adapters == by_hand["adapters"]
    assert found.weights == by_hand["backbone"] + by_hand["decoder"]
    assert found.attention == by_hand["backbone_attention"] + by_hand["decoder_attention"]
    assert found.model == found.weights + found.attention + found.adapters


@pytest.mark.parametrize(
    "changes",
    [{"remat": "full"}, {"remat": "attention"}, {"remat": "offload"}, {"micro_batches": 4}],
    ids=lambda changes: " ".join(map(str, *changes.items())),
)
@pytest.mark.parametrize("stage", ["video", "action"])
def test_how_a_step_is_computed_changes_nothing(stage, changes):
    plain, other = tiny.experiment(stage=stage), tiny.experiment(stage=stage, train=changes, attention="cudnn")
    assert step_flops(tiny.model(other)) == step_flops(tiny.model(plain))
    assert video_tokens(tiny.model(other)) == video_tokens(tiny.model(plain)) == 6


def test_a_step_is_of_the_whole_batch():
    """Adapters are merged once a step."""
    lora = {"rank": 2}
    eight, one = (step_flops(tiny.model(tiny.experiment(stage="video", lora=lora, train={"batch_size": n}))) for n in (8, 1))
    assert eight == dataclasses.replace(one, tokenizer=8 * one.tokenizer, weights=8 * one.weights, attention=8 * one.attention)
    assert 0 < eight.adapters == one.adapters < eight.model and eight.tokenizer > 0


def test_xla_counts_the_same_and_little_else():
    """In one block, since XLA counts the body of a loop once; its count has elementwise operations too."""
    config = tiny.experiment(
        stage="video",
        text={"rows": 64},
        train={"batch_size": 1},
        data={"image_size": (64, 128)},
        backbone={"width": 256, "num_blocks": 1, "text_width": 256, "hidden_block": 1, "mlp_ratio": 4.0},
    )
    vam = tiny.model(config)
    trained, frozen = jax.eval_shape(lambda params: split_params(params, config), vam.shapes)

    def loss(trained, frozen, batch):
        return vam.loss(join_params(trained, frozen, config), batch, vam.draw(jax.random.key(0), 1))[0]

    analysis = jax.jit(jax.grad(loss)).lower(trained, frozen, batch_shapes(config, config.train.batch_size)).cost_analysis()
    found = step_flops(vam)
    assert analysis["flops"] == pytest.approx(found.model + found.tokenizer, rel=0.05)


def test_the_published_backbone_by_hand():
    """2B at 61 frames of 480x640: 16 latent frames of 30x40 tokens, 512 rows of text."""
    tokens, frames, width, text = 16 * 30 * 40, 16, 2048, 512
    dense = tokens * (4 + 2 + 8) * width**2 + text * 2 * 1024 * width + 3 * frames * (width * 256 + 256 * 3 * width)
    attended = 2 * tokens**2 * width + 2 * tokens * text * width
    outside = tokens * (72 + 64) * width + 4 * frames * width**2 + frames * (width * 256 + 256 * 2 * width)
    forward = 2 * (28 * (dense + attended) + outside)
    vam = VideoActionModel(PUBLISHED)
    inputs = VideoInputs(shape(1, 1, 16, 60, 80, 16), shape(1, 16), shape(1, text, 1024), shape(1, 16))
    with assuming(PAPER):
        assert counted(lambda params, inputs: vam.module("backbone", params)(inputs), vam.shapes, inputs) == forward
    assert 1.50e14 < forward < 1.51e14
    found = step_flops(vam)
    assert video_tokens(vam) == tokens
    assert 2.998 * forward < found.model < 3 * forward  # inputs of the first layers need no gradient
    assert found.attention == 3 * 2 * 28 * attended


def test_the_frozen_backbone_is_run_once_up_to_where_it_is_read():
    def at(draws):
        train = TrainConfig(batch_size=1, action_draws=draws)
        return VideoActionModel(dataclasses.replace(PUBLISHED, stage="action", train=train))

    vam = at(1)
    latents = shape(1, 1, *PUBLISHED.latent_shape)
    told = Conditioning(latents, shape(1, PUBLISHED.text.rows, PUBLISHED.backbone.text_width))
    with assuming(PAPER):
        hidden = jax.make_jaxpr(vam.hidden_at)(vam.shapes, told, latents, shape(1))
    frozen = products(hidden.jaxpr, ("attention",))
    one, eight = step_flops(vam), step_flops(at(8))
    assert eight.attention - frozen["attention"] == 8 * (one.attention - frozen["attention"]) > 0
    few, many = one.weights - frozen[""], eight.weights - frozen[""]
    assert 0 < few < many < 1.2 * few  # most of it are keys and values of the context
