"""Published weights → run → published weights, and what is refused on the way."""

import dataclasses
import json
import re

import chex
import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel

from mimic_video.config import CompatConfig
from mimic_video.embodiments import Embodiment
from mimic_video.policy.policy import Policy
from mimic_video.runs import checkpoints, directory
from mimic_video.training.loop import train
from mimic_video.transforms import compute_statistics, statistics_to_published, to_json
from mimic_video.weights.files import open_tensors, write_pt
from mimic_video.weights.published import ACTION_DECODER_NAMES, VIDEO_DIT_NAMES, export_params, published_shapes
from mimic_video.weights.wan_names import WAN_VAE_NAMES

pytestmark = pytest.mark.reference

ACTION = tiny.experiment(
    precision="bfloat16",
    tokenizer={"kind": "wan", "width": 2},
    backbone={"num_heads": 1},
    decoder={"action_dim": 10, "proprio_dim": 10},
    data={"raw_action_dims": (3, 4, 5, 6, 7, 8)},
    train={"ema_decay": 0.0},
    compat={"percentile_clamp": True},
)
NAMES = {"tokenizer": WAN_VAE_NAMES, "backbone": VIDEO_DIT_NAMES, "decoder": ACTION_DECODER_NAMES}
FILES = {
    "tokenizer": "video_backbone/tokenizer/tokenizer.pth",
    "backbone": "video_backbone/v2w_bridge_lora_fused.pt",
    "decoder": "action_decoder/w2a_bridge_iter_1.pt",
}
PATTERNS = (
    "--backbone=video_backbone/v2w_*.pt",
    "--decoder=action_decoder/*bridge*.pt",
    "--statistics=dataset_statistics/*.json",
)


def shapes_of(config):
    return tiny.shapes(config)


@pytest.fixture(scope="module")
def tensors():
    """Network → its published tensors: bfloat16, but for the tokenizer."""
    random, shapes = np.random.default_rng(0), shapes_of(ACTION)

    def fill(part, struct):
        return random.standard_normal(struct.shape, np.float32).astype(np.float32 if part == "tokenizer" else ml_dtypes.bfloat16)

    return {
        part: {name: fill(part, struct) for name, struct in published_shapes(names, shapes[part]).items()}
        for part, names in NAMES.items()
    }


@pytest.fixture(scope="module")
def statistics():
    random = np.random.default_rng(1)
    return {
        "action": compute_statistics(random.standard_normal((20, ACTION.data.action_horizon, 10))),
        "proprio": compute_statistics(random.standard_normal((20, 1, 10))),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory, tensors, statistics):
    """A folder in the layout of the published repository."""
    folder = tmp_path_factory.mktemp("published")
    for part, file in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        prefix = "" if part == "tokenizer" else "net."
        write_pt(folder / file, ((prefix + name, value) for name, value in tensors[part].items()))
    (folder / "dataset_statistics").mkdir()
    (folder / "dataset_statistics" / "bridge.json").write_text(json.dumps(statistics_to_published(statistics, "bridge")))
    return folder


@pytest.fixture
def convert(launch, tmp_path, config_file):
    """Runs launch/convert.py towards tmp_path/run and returns what it says."""

    def run(source, *arguments, config=ACTION, stage="action"):
        return launch(
            "convert",
            f"--config={config_file(config)}:{stage}",
            f"--source={source}",
            f"--workdir={tmp_path / 'run'}",
            *arguments,
        )

    return run


def assert_params(run, tensors, precision="stored"):
    """The run has the networks of `tensors`, bit for bit."""
    params = checkpoints.load_params(run, precision)[0]
    assert params.keys() == tensors.keys()
    for part in tensors:
        assert_same(dict(export_params(params[part], NAMES[part])), tensors[part])
    return params


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in two:
        first, second = np.asarray(one[name]), np.asarray(two[name])
        assert first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes(), name


def assert_refused(message, *parts):
    assert message.startswith("error: ")
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in {message!r}"


def test_a_policy_from_published_files(convert, source, tmp_path, tensors, statistics):
    run = tmp_path / "run"
    message = convert(source, *PATTERNS)
    assert f"wrote {run}" in message and f"decoder: {source / FILES['decoder']}" in message
    assert_params(run, tensors)
    configured, step = checkpoints.load_params(run)
    assert step == 0 and {leaf.dtype.name for leaf in jax.tree.leaves(configured)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(checkpoints.load_params(run, "float32")[0])} == {"float32"}
    assert directory.read_config(run) == ACTION
    robot = directory.load_embodiments(run)["bridge"]
    np.testing.assert_array_equal(robot.statistics["action"].mean_clamped, statistics["action"].mean_clamped)
    assert robot.raw_dims == {"action": ACTION.data.raw_action_dims, "proprio": ()}
    policy = Policy.load(run)
    chunk = policy(np.zeros((1, 5, *tiny.SIZE, 3), np.uint8), np.zeros((1, 10), np.float32), ["do it"])
    assert chunk.shape == (1, 4, 10) and np.isfinite(chunk).all()


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_run_as_published_files(convert, launch, source, tmp_path, tensors, statistics, form):
    convert(source, *PATTERNS)
    out = tmp_path / "export"
    launch("convert", f"--workdir={tmp_path / 'run'}", f"--out={out}", f"--format={form}", "--published_keys=bridge")
    tokenizer = "tokenizer.pth" if form == "pt" else "tokenizer.safetensors"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == sorted(
        [
            f"video_backbone/tokenizer/{tokenizer}",
            f"video_backbone/run.{form}",
            f"action_decoder/run.{form}",
            "dataset_statistics/run.json",
        ]
    )
    for part, folder in (("backbone", "video_backbone"), ("decoder", "action_decoder")):
        assert_same(open_tensors(out / folder / f"run.{form}"), {f"net.{name}": value for name, value in tensors[part].items()})
    assert_same(open_tensors(out / "video_backbone" / "tokenizer" / tokenizer), tensors["tokenizer"])
    published = json.loads((out / "dataset_statistics" / "run.json").read_text())
    assert published == statistics_to_published(statistics, "bridge")


def test_an_export_in_float32_with_our_own_statistics_comes_back(convert, launch, source, tmp_path, tensors):
    convert(source, *PATTERNS)
    (tmp_path / "run").rename(tmp_path / "first")
    launch("convert", f"--workdir={tmp_path / 'first'}", f"--out={tmp_path / 'export'}", "--precision=float32")
    wide = {part: {name: np.float32(value) for name, value in values.items()} for part, values in tensors.items()}
    backbone = safetensors.numpy.load_file(tmp_path / "export" / "video_backbone" / "first.safetensors")
    assert_same(backbone, {f"net.{name}": value for name, value in wide["backbone"].items()})
    convert(
        tmp_path / "export",
        "--backbone=video_backbone/*.safetensors",
        "--decoder=action_decoder/*",
        "--statistics=dataset_statistics/*",
        "--tokenizer=video_backbone/tokenizer/*",
    )
    assert_params(tmp_path / "run", wide)
    robots = [next(iter(directory.load_embodiments(tmp_path / name).values())) for name in ("first", "run")]
    assert to_json(robots[0].statistics) == to_json(robots[1].statistics)


def test_a_backbone_alone(convert, source, tmp_path, tensors):
    convert(source, PATTERNS[0], stage="video")
    assert_params(tmp_path / "run", {part: tensors[part] for part in ("tokenizer", "backbone")})
    assert not (tmp_path / "run" / "embodiments.json").exists()


def test_lora_and_moving_averages(convert, tmp_path, tensors):
    """A checkpoint with one adapted layer, and other values in its moving average."""
    folder, layer = tmp_path / "source", "blocks.1.mlp.layer1"
    whole, random = dict(tensors["backbone"]), np.random.default_rng(2)
    base = whole.pop(f"{layer}.weight")
    a, b = (random.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((4, base.shape[1]), (base.shape[0], 4)))
    adapted = {f"{layer}.base_layer.weight": base, f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
    average = {f"net_ema.{name}": -value for name, value in tensors["backbone"].items()}
    (folder / "video_backbone" / "tokenizer").mkdir(parents=True)
    write_pt(folder / FILES["tokenizer"], tensors["tokenizer"].items())
    write_pt(folder / FILES["backbone"], ({f"net.{name}": value for name, value in (whole | adapted).items()} | average).items())
    convert(folder, PATTERNS[0], "--lora_alpha=8", stage="video")
    kernel = checkpoints.load_params(tmp_path / "run", "stored")[0]["backbone"]["blocks"]["mlp"]["up"]["kernel"]
    expected = np.float32(base) + 2 * np.float32(b) @ np.float32(a)
    np.testing.assert_allclose(np.float32(kernel[1]).T, expected, rtol=2**-6, atol=0.05)
    (tmp_path / "run").rename(tmp_path / "first")
    convert(folder, PATTERNS[0], "--ema", stage="video")
    assert_params(
        tmp_path / "run",
        {"tokenizer": tensors["tokenizer"], "backbone": {name: -value for name, value in tensors["backbone"].items()}},
    )


@pytest.fixture
def diffusers_folder(tmp_path):
    """What diffusers saves of networks that are those of `ACTION`, the transformer in several shards."""
    torch.manual_seed(0)
    backbone = ACTION.backbone
    transformer = CosmosTransformer3DModel(
        in_channels=17,
        num_attention_heads=backbone.num_heads,
        attention_head_dim=backbone.width // backbone.num_heads,
        num_layers=backbone.num_blocks,
        mlp_ratio=backbone.mlp_ratio,
        text_embed_dim=backbone.text_width,
        adaln_lora_dim=backbone.adaln_lora_dim,
        rope_scale=backbone.rope_ratio,
        extra_pos_embed_type=None,
    ).to(torch.bfloat16)
    folder = tmp_path / "diffusers"
    transformer.save_pretrained(folder / "transformer", max_shard_size="10KB")
    AutoencoderKLWan(base_dim=ACTION.tokenizer.width).save_pretrained(folder / "vae")
    return folder, transformer


def test_a_folder_of_diffusers(convert, diffusers_folder, tmp_path):
    folder, transformer = diffusers_folder
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    convert(folder, stage="video")
    params = checkpoints.load_params(tmp_path / "run", "stored")[0]
    block = transformer.transformer_blocks[1]
    np.testing.assert_array_equal(
        np.float32(params["backbone"]["blocks"]["cross_attn"]["k_proj"]["kernel"][1]).T,
        block.attn2.to_k.weight.detach().float().numpy(),
    )
    assert params["backbone"]["patch_proj"]["kernel"].dtype == ml_dtypes.bfloat16
    assert params["tokenizer"]["quant_conv"]["kernel"].dtype == np.float32


def test_a_folder_of_diffusers_with_another_network(convert, diffusers_folder):
    other = tiny.experiment(tokenizer={"kind": "wan", "width": 3}, backbone={"num_blocks": 3})
    assert_refused(
        convert(diffusers_folder[0], config=other, stage="video"),
        r"'backbone.num_blocks' is 3, there 2",
        r"'tokenizer.width' is 3, there 2",
    )


@pytest.mark.parametrize(
    ("arguments", "stage", "parts"),
    [
        (PATTERNS[:1], "action", ["stage 'action' needs --decoder and --statistics"]),
        (PATTERNS[1:], "action", ["stage 'action' needs --backbone"]),
        (PATTERNS, "video", ["stage 'video' has no use for --decoder and --statistics"]),
        ((), "video", ["is not a diffusers folder: it has no transformer/config.json"]),
        (("--backbone=video_backbone/v3w_*.pt",), "video", ["matches 0 files", FILES["backbone"], FILES["decoder"]]),
        (("--backbone=**/*.pt",), "video", ["matches 2 files", FILES["backbone"], FILES["decoder"]]),
        (("--backbone=/data/x.pt",), "video", ["is absolute; expected a pattern relative to --source"]),
        (
            ("--backbone=action_decoder/*.pt",),
            "video",
            [r"w2a_bridge_iter_1\.pt does not fit", "missing 'x_embedder", "unexpected"],
        ),
        ((*PATTERNS[:2], "--statistics=action_decoder/*.pt"), "action", ["is not a dataset statistics file"]),
        ((PATTERNS[0], "--ema"), "video", [r"v2w_bridge_lora_fused\.pt holds no moving average"]),
    ],
)
def test_mistakes_on_the_command_line(convert, source, tmp_path, arguments, stage, parts):
    assert_refused(convert(source, *arguments, stage=stage), *parts)
    assert not (tmp_path / "run").exists()


def test_configurations_of_other_networks(convert, source):
    wider = tiny.experiment(tokenizer={"kind": "wan", "width": 2}, backbone={"width": 32})
    assert_refused(
        convert(source, PATTERNS[0], config=wider, stage="video"),
        r"'x_embedder.proj.1.weight' has shape \(16, 72\); expected \(32, 72\)",
    )
    assert_refused(convert(source, PATTERNS[0], config=tiny.experiment(), stage="video"), "'tokenizer.kind' is 'pca'")
    longer = tiny.experiment(
        tokenizer={"kind": "wan", "width": 2},
        data={"action_horizon": 6},
        decoder={"action_dim": 10, "proprio_dim": 10},
    )
    assert_refused(convert(source, *PATTERNS, config=longer), r"'action' has shape \(4, 10\); the decoder expects \(6, 10\)")


def test_a_directory_that_holds_something_is_left_alone(convert, source, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    assert_refused(convert(source, PATTERNS[0], stage="video"), "run is not empty")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


def test_repositories(convert, source, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("somebody/some-weights", PATTERNS[0], stage="video")
    assert asked == [("somebody/some-weights", [FILES["tokenizer"], "video_backbone/v2w_*.pt"])]
    assert (tmp_path / "run" / "config.json").exists()


def test_sources_that_are_not_there(convert, tmp_path, monkeypatch):
    assert_refused(
        convert(tmp_path / "nowhere", PATTERNS[0], stage="video"), "nowhere is not a folder, nor the name of a Hugging Face"
    )

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert_refused(
        convert("somebody/some-weights", PATTERNS[0], stage="video"), "could not be fetched from Hugging Face: .*no connection"
    )


def test_a_folder_of_the_name_run_is_no_request_to_export(launch, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = launch("convert", f"--config={config_file(ACTION)}", "--source", "run", f"--workdir={tmp_path / 'out'}")
    assert message == "error: stage 'action' needs --decoder and --statistics"  # of the other direction


def test_published_statistics_without_the_published_clamp_are_refused(convert, source):
    message = convert(source, *PATTERNS, config=dataclasses.replace(ACTION, compat=CompatConfig()))
    assert_refused(message, "'compat.percentile_clamp' is False; expected True, since .*json has published statistics")


def test_exports_that_are_refused(convert, launch, source, tmp_path):
    assert_refused(
        launch("convert", f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'export'}"), "none is not a run directory"
    )
    assert not (tmp_path / "none").exists()
    other = {"action_dim": 4, "proprio_dim": 10}
    config = tiny.experiment(decoder=other, compat={"percentile_clamp": True})
    random = np.random.default_rng(0)
    statistics = {
        key: compute_statistics(random.standard_normal((5, 1, width))) for key, width in (("action", 4), ("proprio", 10))
    }
    robot = Embodiment("narrow", 0, statistics, {"action": (), "proprio": ()})
    checkpoints.save_converted(tmp_path / "narrow", config, tiny.params(config), {"narrow": robot})
    assert_refused(
        launch("convert", f"--workdir={tmp_path / 'narrow'}", f"--out={tmp_path / 'export'}", "--published_keys=bridge"),
        r"\(1, 4\)",
    )
    config = tiny.experiment(decoder=other)
    checkpoints.save_converted(tmp_path / "kept", config, tiny.params(config), {"narrow": robot})
    assert_refused(
        launch("convert", f"--workdir={tmp_path / 'kept'}", f"--out={tmp_path / 'export'}", "--published_keys=bridge"),
        "--published_keys=bridge of .*kept, whose 'compat.percentile_clamp' is False; expected True",
    )


def test_training_does_not_continue_in_a_converted_run(tmp_path):
    config = tiny.experiment(stage="video")
    checkpoints.save_converted(tmp_path / "run", config, tiny.params(config))

    def never(_):
        pytest.fail("training has started")

    with pytest.raises(
        directory.RunError, match=r"converted weights without optimizer state.*--config.backbone_run=.*run and another"
    ):
        train(config, tmp_path / "run", tiny.Data(config, never))


def test_converted_weights_keep_the_dtype_that_each_network_computes_in(tmp_path):
    """The principal components of the small tokenizer stay float32; a moving average in the configuration has no effect."""
    config = tiny.experiment(stage="video", precision="bfloat16", train={"ema_decay": 0.9})
    params = tiny.params(config)
    checkpoints.save_converted(tmp_path / "run", config, params)
    loaded = checkpoints.load_params(tmp_path / "run")[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded["tokenizer"])} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded["backbone"])} == {"bfloat16"}
    for part in ("tokenizer", "backbone"):
        chex.assert_trees_all_equal(checkpoints.load_params(tmp_path / "run", "stored")[0][part], params[part])
        rounded = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), params[part], loaded[part])
        chex.assert_trees_all_equal(loaded[part], rounded)


def test_embodiments_go_with_the_stage(tmp_path, statistics):
    robots = {"arm": Embodiment("arm", 0, statistics, {"action": (), "proprio": ()})}
    for config, given in ((tiny.experiment(), None), (tiny.experiment(stage="video"), robots)):
        with pytest.raises(ValueError, match=f"for stage '{config.stage}'"):
            checkpoints.save_converted(tmp_path / "run", config, {}, given)
    assert not (tmp_path / "run").exists()
