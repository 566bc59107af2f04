"""Import and export of parameters, strictness, prefixes, and LoRA against peft."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mimic_video.config import ActionDecoderConfig, TokenizerConfig, VideoDiTConfig
from mimic_video.models.action_decoder import ActionDecoder
from mimic_video.models.video_dit import VideoDiT
from mimic_video.models.wan_vae import WanVAE
from mimic_video.weights.files import open_tensors, write_pt, write_safetensors
from mimic_video.weights.published import (
    ACTION_DECODER_NAMES,
    VIDEO_DIT_NAMES,
    LazyTensor,
    Place,
    WeightsError,
    export_params,
    fuse_lora,
    import_params,
    published_shapes,
    without_prefix,
)
from mimic_video.weights.wan_names import DIFFUSERS_VAE_NAMES, WAN_VAE_NAMES

DIT = VideoDiTConfig(width=16, num_heads=2, mlp_ratio=2.0, text_width=8, adaln_lora_dim=4)  # of 28 blocks
DECODER = ActionDecoderConfig(  # of 24 blocks; with embedders as deep as the published ones
    width=64, num_heads=4, mlp_ratio=2.0, adaln_lora_dim=4, time_rank=8, proprio_dim=1, action_dim=1
)
# Networks at a small width, their names, and the published number of tensors.
NETWORKS = {
    "backbone": (lambda: VideoDiT(DIT, 16, nnx.Rngs(0)), VIDEO_DIT_NAMES, 567),
    "decoder": (lambda: ActionDecoder(DECODER, 16, 15, nnx.Rngs(0)), ACTION_DECODER_NAMES, 509),
    "vae": (lambda: WanVAE(TokenizerConfig(kind="wan", width=4), nnx.Rngs(0)), WAN_VAE_NAMES, 194),
    "vae, diffusers": (lambda: WanVAE(TokenizerConfig(kind="wan", width=4), nnx.Rngs(0)), DIFFUSERS_VAE_NAMES, 194),
}
NAMES = {
    "norm.gamma": Place("norm/scale", ones=3),
    "conv.weight": Place("conv/kernel"),
    "proj.weight": Place("proj/kernel", ones=2),
    "blocks.{i}.dense.weight": Place("blocks/dense/kernel"),
    "blocks.{i}.norm.weight": Place("blocks/norm/scale"),
}


def shapes_of(make):
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def random_tensors(shapes, dtype=ml_dtypes.bfloat16):
    random = np.random.default_rng(0)
    return {name: random.standard_normal(struct.shape, np.float32).astype(dtype) for name, struct in shapes.items()}


def small():
    """A tree of every layout, and its published tensors."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shapes = {
        "norm": {"scale": struct(3)},
        "conv": {"kernel": struct(3, 1, 2, 4, 5)},
        "proj": {"kernel": struct(4, 6)},
        "blocks": {"dense": {"kernel": struct(2, 7, 8)}, "norm": {"scale": struct(2, 8)}},
    }
    return shapes, random_tensors(published_shapes(NAMES, shapes), np.float32)


def assert_equal_bits(one, two):
    assert one.keys() == two.keys()
    for name in one:
        first, second = np.asarray(one[name]), np.asarray(two[name])
        assert first.dtype == second.dtype and first.shape == second.shape, name
        assert first.tobytes() == second.tobytes(), name


@pytest.mark.parametrize("suffix", [pytest.param("pt", marks=pytest.mark.reference), "safetensors"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_tensor_of_a_network_goes_through_a_file_and_back(tmp_path, network, suffix):
    make, names, count = NETWORKS[network]
    shapes = shapes_of(make)
    expected = published_shapes(names, shapes)
    assert len(expected) == count
    tensors = random_tensors(expected)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        import torch

        torch.save(
            {f"net.{name}": torch.tensor(value.view(np.int16)).view(torch.bfloat16) for name, value in tensors.items()}, path
        )
    else:
        bfloat16 = {f"net.{name}": jax.ShapeDtypeStruct(struct.shape, jnp.bfloat16) for name, struct in expected.items()}
        write_safetensors(path, bfloat16, ((f"net.{name}", value) for name, value in tensors.items()))
    params = import_params(without_prefix(open_tensors(path)), names, shapes, source=str(path))
    chex.assert_trees_all_equal_shapes(params, shapes)
    exported = dict(export_params(params, names))
    assert list(exported) == list(expected)
    assert_equal_bits(exported, tensors)
    if suffix == "pt":
        write_pt(tmp_path / "again.pt", exported.items())
        assert_equal_bits(open_tensors(tmp_path / "again.pt"), tensors)


def test_published_sizes():
    for config, make, names, parameters, tensors in (
        (VideoDiTConfig(), lambda c: VideoDiT(c, 16, nnx.Rngs(0)), VIDEO_DIT_NAMES, 1_956_413_440, 567),
        (ActionDecoderConfig(), lambda c: ActionDecoder(c, 2048, 15, nnx.Rngs(0)), ACTION_DECODER_NAMES, 498_990_730, 509),
        (ActionDecoderConfig(), lambda c: ActionDecoder(c, 2048, 60, nnx.Rngs(0)), ACTION_DECODER_NAMES, 499_036_810, 509),
    ):
        expected = published_shapes(names, shapes_of(lambda make=make, config=config: make(config)))
        assert len(expected) == tensors
        assert sum(np.prod(struct.shape, dtype=int) for struct in expected.values()) == parameters


def test_published_shapes_of_the_2b_backbone():
    """As SPEC 3.10 lists them."""
    shapes = published_shapes(VIDEO_DIT_NAMES, shapes_of(lambda: VideoDiT(VideoDiTConfig(), 16, nnx.Rngs(0))))
    for name, shape in {
        "x_embedder.proj.1.weight": (2048, 72),
        "t_embedder.1.linear_2.weight": (6144, 2048),
        "blocks.27.cross_attn.k_proj.weight": (2048, 1024),
        "blocks.0.self_attn.q_norm.weight": (128,),
        "blocks.3.mlp.layer1.weight": (8192, 2048),
        "blocks.3.adaln_modulation_mlp.2.weight": (6144, 256),
        "final_layer.linear.weight": (64, 2048),
        "final_layer.adaln_modulation.2.weight": (4096, 256),
    }.items():
        assert shapes[name].shape == shape


def test_layouts():
    shapes, tensors = small()
    assert tensors["norm.gamma"].shape == (3, 1, 1, 1)
    assert tensors["conv.weight"].shape == (5, 4, 3, 1, 2)
    assert tensors["proj.weight"].shape == (6, 4, 1, 1)
    params = import_params(tensors, NAMES, shapes)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.gamma"][:, 0, 0, 0])
    np.testing.assert_array_equal(params["conv"]["kernel"][2, 0, 1], tensors["conv.weight"][:, :, 2, 0, 1].T)
    np.testing.assert_array_equal(params["proj"]["kernel"], tensors["proj.weight"][:, :, 0, 0].T)
    np.testing.assert_array_equal(params["blocks"]["dense"]["kernel"][1], tensors["blocks.1.dense.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["norm"]["scale"][1], tensors["blocks.1.norm.weight"])


def test_dtype_is_kept_unless_another_is_asked_for():
    shapes, tensors = small()
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(import_params(half, NAMES, shapes))} == {np.dtype(ml_dtypes.bfloat16)}
    wide = import_params(half, NAMES, shapes, dtype=np.float32)
    np.testing.assert_array_equal(wide["blocks"]["norm"]["scale"][0], np.float32(half["blocks.0.norm.weight"]))
    assert wide["conv"]["kernel"].dtype == np.float32
    half["blocks.1.norm.weight"] = tensors["blocks.1.norm.weight"]
    with pytest.raises(WeightsError, match=r"'blocks.\{i\}.norm.weight' are stored as bfloat16 and float32"):
        import_params(half, NAMES, shapes)
    assert import_params(half, NAMES, shapes, dtype=np.float32)["blocks"]["norm"]["scale"].dtype == np.float32


def test_params_are_taken_by_jax_without_a_copy():
    shapes, tensors = small()
    for leaf in jax.tree.leaves(import_params(tensors, NAMES, shapes)):
        assert leaf.flags["C_CONTIGUOUS"] and leaf.ctypes.data % 64 == 0
        assert jax.device_put(leaf, may_alias=True).unsafe_buffer_pointer() == leaf.ctypes.data


def test_tensors_are_read_one_by_one():
    shapes, tensors = small()
    read = []

    def lazy(name):
        return LazyTensor(tensors[name].shape, tensors[name].dtype, lambda: (read.append(name), tensors[name])[1])

    wrong = {name: lazy(name) for name in tensors} | {"more": LazyTensor((1,), np.dtype(np.float32), pytest.fail)}
    with pytest.raises(WeightsError, match="unexpected 'more'"):
        import_params(wrong, NAMES, shapes)
    assert read == []
    import_params({name: lazy(name) for name in tensors}, NAMES, shapes)
    assert sorted(read) == sorted(tensors)


def test_all_that_does_not_fit_is_in_one_error():
    shapes, tensors = small()
    del tensors["norm.gamma"], tensors["blocks.1.dense.weight"]
    tensors["conv.weight"] = tensors["conv.weight"][:, :3]
    tensors["proj.weight"] = np.zeros((6, 4, 1, 1), np.int8)
    tensors["blocks.2.norm.weight"] = np.zeros(8, np.float32)
    with pytest.raises(WeightsError) as error:
        import_params(tensors, NAMES, shapes, source="some.pt")
    message = str(error.value)
    assert message.startswith("some.pt does not fit this network in 5 tensors:")
    for part in (
        "missing 'norm.gamma' (3, 1, 1, 1)",
        "missing 'blocks.1.dense.weight' (8, 7)",
        "'conv.weight' has shape (5, 3, 3, 1, 2); expected (5, 4, 3, 1, 2)",
        "'proj.weight' holds int8; expected floating point",
        "unexpected 'blocks.2.norm.weight' (8,)",
    ):
        assert part in message


def test_another_networks_weights_are_refused():
    decoder, backbone = (shapes_of(NETWORKS[name][0]) for name in ("decoder", "backbone"))
    tensors = random_tensors(published_shapes(ACTION_DECODER_NAMES, decoder))
    with pytest.raises(WeightsError, match=r"missing 'x_embedder.proj.1.weight' \(16, 72\)(.|\n)*unexpected 'obs_mask_token'"):
        import_params(tensors, VIDEO_DIT_NAMES, backbone)


@pytest.mark.parametrize(
    "name",
    [
        "accum_iteration",
        "accum_video_sample_counter",
        "pos_embedder.seq",
        "_extra_state",
        "pos_embedder.dim_spatial_range",
        "blocks.0.self_attn.q_norm._extra_state",
    ],
)
def test_counters_and_buffers_are_passed_over(name):
    shapes, tensors = small()
    import_params(tensors | {name: np.zeros(3, np.int64)}, NAMES, shapes)


def test_a_parameter_without_a_published_name():
    shapes, tensors = small()
    shapes["extra"] = {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(ValueError, match=r"no published names for the parameters \['extra/bias'\]"):
        import_params(tensors, NAMES, shapes)
    with pytest.raises(ValueError, match="extra/bias"):
        list(export_params({"extra": {"bias": np.zeros(3)}}, NAMES))


def test_prefixes():
    one, two = np.zeros(1), np.ones(1)
    tensors = {"net.a.weight": one, "net_ema.a.weight": two}
    assert without_prefix(tensors)["a.weight"] is one
    assert without_prefix(tensors, ema=True)["a.weight"] is two
    assert list(without_prefix({"conv1.weight": one})) == ["conv1.weight"]
    with pytest.raises(WeightsError, match=r"my.pt holds no moving average"):
        without_prefix({"net.a.weight": one}, ema=True, source="my.pt")
    with pytest.raises(WeightsError, match=r"both with and without 'net.': \['a'\]"):
        without_prefix({"net.a": one, "a": two})


# LoRA.


@pytest.mark.reference
@pytest.mark.parametrize(("precision", "alpha"), [("bfloat16", 32.0), ("float32", 32.0), ("float32", 5.0)])
def test_fused_lora_is_what_peft_merges(precision, alpha):
    """Fused, adapted and fully trained layers in one checkpoint. Another order of summation may round otherwise."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    dtype = getattr(torch, precision)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(24, 40, bias=False), "adaln": torch.nn.Linear(24, 8, bias=False)})
    model = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=alpha, target_modules=["q_proj"]), model).to(dtype)
    model["q_proj"].lora_B["default"].weight.data.normal_()
    tensors = {
        name: value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else value.numpy()
        for name, value in model.state_dict().items()
    }
    assert set(tensors) == {
        "q_proj.base_layer.weight",
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
        "adaln.weight",
    }
    before = np.array(tensors["q_proj.base_layer.weight"], np.float32)
    fused = fuse_lora({name: value.copy() for name, value in tensors.items()}, alpha)
    result = np.asarray(fused["q_proj.weight"])
    model["q_proj"].merge()
    merged = model["q_proj"].base_layer.weight.detach().float().numpy()
    assert set(fused) == {"q_proj.weight", "adaln.weight"} and fused["adaln.weight"].dtype == result.dtype
    assert np.abs(merged - before).max() > 0.1
    np.testing.assert_allclose(np.float32(result), merged, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    if dtype == torch.bfloat16:
        assert result.dtype == ml_dtypes.bfloat16 and np.mean(np.float32(result) == merged) > 0.98


def lora(**changes):
    f = np.float32
    return {
        "net.x.base_layer.weight": np.zeros((4, 6), f),
        "net.x.lora_A.default.weight": np.zeros((2, 6), f),
        "net.x.lora_B.default.weight": np.zeros((4, 2), f),
    } | changes


def test_lora_that_cannot_be_fused():
    assert np.asarray(fuse_lora(lora())["net.x.weight"]).shape == (4, 6)
    whole = lora()
    for name in whole:
        part = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(WeightsError, match=rf"LoRA weights of my.pt .* in 1 layers:\n  missing \['{name}'\]"):
            fuse_lora(part, source="my.pt")
    for name, shape in (
        ("base_layer", (4, 5)),
        ("lora_A.default", (3, 6)),
        ("lora_B.default", (4, 2, 1)),
        ("base_layer", (5, 6)),
    ):
        with pytest.raises(WeightsError, match=r"'net.x' has base \(.*expected \(out, in\), \(r, in\), \(out, r\)"):
            fuse_lora(lora(**{f"net.x.{name}.weight": np.zeros(shape, np.float32)}))
    with pytest.raises(WeightsError, match="base float32, A float16, B float32; expected one dtype"):
        fuse_lora(lora(**{"net.x.lora_A.default.weight": np.zeros((2, 6), np.float16)}))
    with pytest.raises(WeightsError, match=r"'net.x.weight' is there beside its parts"):
        fuse_lora(lora(**{"net.x.weight": np.zeros((4, 6), np.float32)}))
