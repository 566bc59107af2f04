"""What is computed in a step by other means has to be the same step."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mimic_video.config import ConfigError, MeshConfig
from mimic_video.parallel.sharding import global_batch, make_mesh, place
from mimic_video.stages import join_params, split_params
from mimic_video.training.steps import make_state, make_train_step
from mimic_video.trees import path_name

LEARNING_RATE = tiny.experiment().train.learning_rate
SMALL = {"backbone": {"num_blocks": 1, "num_heads": 8, "width": 48}, "decoder": {"num_blocks": 1, "num_heads": 4}}


def run_steps(config, mesh, batches, starts=()):
    """Metrics of each step, the states after them, and what is frozen. With `starts`, the states that further steps begin at."""
    trained, frozen = split_params(tiny.params(config), config)
    state, frozen = place(make_state(config, trained), mesh), place(frozen, mesh)
    step, logged, states = make_train_step(tiny.model(config), mesh, state), [], []
    for batch, start in itertools.zip_longest(batches, (None, *starts)):
        if start is not None:
            state = place(start, mesh)
        state, metrics = step(state, frozen, global_batch(batch, mesh))
        logged.append(jax.device_get(metrics))
        states.append(jax.device_get(state))
    return logged, states, state, frozen


def padded_batch(config, seed):
    batch = tiny.batch(config, 8, seed)
    batch.frame_mask[0, 6:] = batch.frame_mask[3, 5:] = False
    if batch.action_mask is not None:
        batch.action_mask[5, 1:] = batch.action_mask[2] = False
    return batch


@functools.cache
def two_steps(stage, mesh=(1, 1, 1), **train):
    """On a mesh of the first devices, where the second step begins at what the first one leads to on a single device."""
    config = tiny.experiment(stage=stage, train=train, **SMALL)
    devices = jax.devices()[: int(np.prod(mesh))]
    starts = two_steps(stage)[1][:1] if train or len(devices) > 1 else ()
    return run_steps(config, make_mesh(MeshConfig(*mesh), devices), [padded_batch(config, seed) for seed in (0, 1)], starts)


def assert_same_steps(one, other):
    """Up to rounding: of gradients 1e-5 of an array's largest, as Adam's moments have them.

    Adam divides a gradient by the gradient's own size, so that the update of an element has its rounding relative to that, and of
    one close to zero rounding is all there is.
    """
    for a, b in zip(one[0], other[0], strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        for x, y in zip(jax.tree.leaves(a.opt_state), jax.tree.leaves(b.opt_state), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())
        sizes = jax.tree.map(np.sqrt, optax.tree.get(b.opt_state, "nu"))
        updates = jax.tree.map(lambda size: np.minimum(2, 4e-5 * size.max() / (size + 1e-30)), sizes)
        apart = jax.tree.map(lambda update: 1e-6 + LEARNING_RATE * update, updates)
        for x, y in ((a.params, b.params), (a.ema, b.ema)):
            jax.tree.map(lambda p, q, most: np.testing.assert_array_less(np.abs(p - q), most), x, y, apart)


@pytest.mark.parametrize(
    ("stage", "mesh", "train"),
    [
        ("video", (2, 2, 2), {"micro_batches": 2}),
        *(
            pytest.param(*case, marks=pytest.mark.training)
            for case in (
                ("action", (1, 2, 4), {"micro_batches": 2, "remat": "attention"}),
                ("video", (8, 1, 1), {"remat": "attention"}),
                ("video", (1, 2, 4), {}),
                ("video", (1, 1, 8), {"remat": "full"}),
                ("video", (1, 1, 1), {"micro_batches": 2, "remat": "full"}),
                ("action", (2, 4, 1), {}),
                ("action", (1, 1, 2), {"remat": "full"}),
                ("action", (8, 1, 1), {}),
                ("action", (1, 1, 1), {"micro_batches": 2}),
                ("action", (2, 2, 2), {"micro_batches": 2}),
            )
        ),
    ],
    ids=str,
)
def test_a_step_is_that_of_one_device_whatever_it_is_spread_over(stage, mesh, train):
    """Of data, fsdp and sequence, in parts, and with blocks computed again in the backward pass.

    Frames have two patches, which four and eight devices cannot divide. The parts of a batch have different numbers of padded
    frames and actions, one of them none that count.
    """
    assert_same_steps(two_steps(stage, mesh, **train), two_steps(stage))


@pytest.mark.training
def test_parameters_and_moments_are_split_over_fsdp():
    state = two_steps("action", (2, 4, 1))[2]
    block = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert block.shape == (1, 16, 32) and block.addressable_shards[0].data.shape == (1, 4, 32)
    for tree in (state.params, state.ema, state.opt_state):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        split = {path_name(path) for path, leaf in leaves if leaf.addressable_shards[0].data.size * 4 == leaf.size > 4}
        whole = {path_name(path): leaf.size for path, leaf in leaves}
        assert {name for name in whole if name.endswith("blocks/mlp/down/kernel")} <= split
        assert sum(whole[name] for name in split) > 0.8 * sum(whole.values())


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_what_a_policy_keeps_of_a_block(remat):
    """Residuals of the backward pass: all, what attention returns, or nothing but the inputs of blocks."""
    config = tiny.experiment(stage="video", train={"remat": remat})
    vam, params, batch = tiny.model(config), tiny.params(config), tiny.batch(config, 8)
    draws = vam.draw(jax.random.key(0), 8)

    def loss(backbone):
        return vam.video_loss(params | {"backbone": backbone}, batch, draws)[0]

    _, pullback = jax.eval_shape(lambda backbone: jax.vjp(loss, backbone), params["backbone"])
    stacked = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.shape[:3] == (2, 8, 3)]  # blocks, samples, frames
    attended = [shape for shape in stacked if shape[3:] == (2, 2, 8)]  # patches, heads, dimensions of a head
    if remat == "full":
        assert len(stacked) == 1
    elif remat == "attention":
        assert len(stacked) == 3 and len(attended) == 2  # of self-attention and cross-attention
    else:
        assert len(stacked) > 10


# Low-rank adaptation.

LORA = {"rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def adapted():
    config = tiny.experiment(stage="video", lora=LORA, train={"learning_rate": 1e-2})
    trained, _ = split_params(tiny.params(config), config)
    return config, trained, run_steps(config, make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), [tiny.batch(config, 8)] * 2)


def test_adapters_change_nothing_at_first():
    config = tiny.experiment(lora=LORA)
    params = tiny.params(config)
    joined = join_params(*split_params(params, config), config)
    chex.assert_trees_all_equal(joined, params)


@pytest.mark.training
def test_adapters_and_modulations_learn_and_the_rest_stays(adapted):
    _, before, (*_, state, frozen) = adapted
    after = jax.device_get(state.params)
    moved = {
        path_name(path): float(np.abs(a - b).max())
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True)
    }
    assert all(moved.values())
    names = {name.removeprefix("lora/") for name in moved if name.startswith("lora/")}
    assert {"blocks/self_attn/q_proj/kernel/a", "blocks/mlp/down/kernel/b", "patch_proj/kernel/a", "time_out/kernel/b"} <= names
    assert len(names) == 2 * (4 + 4 + 2 + 3)
    full = {name for name in moved if name.startswith("backbone/")}
    assert len(full) == 8 and all("modulation" in name for name in full)
    assert "q_norm" in frozen["backbone"]["blocks"]["self_attn"] and "final_proj" in frozen["backbone"]


@pytest.mark.training
def test_merged_adapters_are_the_scaled_product(adapted):
    config, _, (*_, state, frozen) = adapted
    trained, frozen = jax.device_get((state.params, frozen))
    joined = join_params(trained, frozen, config)["backbone"]["blocks"]["mlp"]["up"]["kernel"]
    adapter = trained["lora"]["blocks"]["mlp"]["up"]["kernel"]
    base = frozen["backbone"]["blocks"]["mlp"]["up"]["kernel"]
    expected = base + 2.0 * np.einsum("nir,nro->nio", adapter["a"], adapter["b"])
    np.testing.assert_allclose(joined, expected, atol=1e-6)
    assert np.abs(expected - base).max() > 1e-4


def test_the_published_recipe_trains_as_many_parameters():  # SPEC 4.3
    config = tiny.experiment(
        stage="video",
        lora={"rank": 256},
        backbone={
            "width": 2048,
            "num_blocks": 28,
            "num_heads": 16,
            "mlp_ratio": 4.0,
            "text_width": 1024,
            "adaln_lora_dim": 256,
        },
    )
    trained = jax.eval_shape(lambda: split_params(tiny.model(config).init(jax.random.key(0)), config)[0])
    adapters, full = (sum(leaf.size for leaf in jax.tree.leaves(trained[part])) for part in ("lora", "backbone"))
    assert (adapters, full) == (370_690_048, 177_733_632)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("q_porj",)}, r"'lora\.targets' has 'q_porj', which names no parameter"),
        ({"trained": ("modulations",)}, r"'lora\.trained' has 'modulations', which names no parameter"),
        ({"trained": ("mlp",)}, r"both name .*/blocks/mlp/"),
    ],
)
def test_names_that_cannot_be_adapted(lora, message):
    config = tiny.experiment(stage="video", lora=LORA | lora)
    with pytest.raises(ConfigError, match=message):
        split_params(tiny.params(config), config)


def test_adapters_learn_on_a_backbone_of_bfloat16():
    config = tiny.experiment(stage="video", lora=LORA, precision="bfloat16")
    trained, frozen = split_params(tiny.params(config), config)
    frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), frozen["backbone"])
    kernel = join_params(trained, {"backbone": frozen}, config)["backbone"]["time_in"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and trained["lora"]["time_in"]["kernel"]["a"].dtype == jnp.float32
