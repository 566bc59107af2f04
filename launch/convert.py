"""Converts published weights into a run directory that every other command reads, and a run back into published files.

    python launch/convert.py --config=configs/published.py:bridge --source=/data/mimic-video --out=runs/bridge \\
        --backbone='video_backbone/v2w_bridge*_fused.pt' --decoder='action_decoder/w2a_bridge*.pt' \\
        --statistics=dataset_statistics/bridge.json
    python launch/convert.py --config=configs/published.py:cosmos --source=nvidia/Cosmos-Predict2-2B-Video2World --out=runs/cosmos
    python launch/convert.py --run=runs/bridge --out=/data/export --robot=bridge

--source is a folder, or a Hugging Face repository, which is fetched. With --backbone it has the layout of the published
repository (SPEC 11); without, that of diffusers (`transformer/`, `vae/`), and holds a backbone and a tokenizer. Patterns are
relative to it and match exactly one file. Checkpoints with LoRA layers are fused. Run in the other direction, the files go to
`video_backbone/`, `action_decoder/` and `dataset_statistics/` of --out under the run's name, with the published tensor names.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import experiment
import jax
from absl import app, flags, logging
from etils import epath

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment, choose
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, absolute, local_path, run_path
from mimic_video.transforms import Statistics, from_json, statistics_from_published, statistics_to_published, to_json
from mimic_video.vam import Params, VideoActionModel
from mimic_video.weights.diffusers import DIFFUSERS_DIT_NAMES, read_component, video_dit_config, wan_config
from mimic_video.weights.files import open_tensors
from mimic_video.weights.layout import write_networks
from mimic_video.weights.published import (
    ACTION_DECODER_NAMES,
    VIDEO_DIT_NAMES,
    WeightsError,
    fuse_lora,
    import_params,
    without_prefix,
)
from mimic_video.weights.wan_names import DIFFUSERS_VAE_NAMES, WAN_VAE_NAMES

_SOURCE = flags.DEFINE_string("source", None, "Folder or Hugging Face repository with weights")
_OUT = flags.DEFINE_string("out", None, "Run directory to write; with --run, folder to export to", required=True)
_BACKBONE = flags.DEFINE_string("backbone", None, "Pattern of the backbone's file; none for a source in diffusers' format")
_TOKENIZER = flags.DEFINE_string("tokenizer", "video_backbone/tokenizer/tokenizer.pth", "Pattern of the tokenizer's file")
_DECODER = flags.DEFINE_string("decoder", None, "Pattern of the action decoder's file; for stage `action`")
_STATISTICS = flags.DEFINE_string("statistics", None, "Pattern of the statistics' file; for stage `action`")
_EMA = flags.DEFINE_bool("ema", False, "Take the moving average (net_ema.) of the backbone and the decoder")
_LORA_ALPHA = flags.DEFINE_float("lora_alpha", 32.0, "Alpha of the LoRA layers of a checkpoint that is not fused")
_RUN = flags.DEFINE_string("run", None, "Run directory to export; the other direction")
_FORMAT: flags.FlagHolder[Any] = flags.DEFINE_enum("format", "safetensors", ["safetensors", "pt"], "Of exported weights")
_PRECISION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "precision", "stored", ["stored", "float32", "bfloat16"], "Of exported weights"
)
_ROBOT = flags.DEFINE_enum("robot", None, ["bridge", "libero"], "Export statistics under this robot's published keys")

_DIFFUSERS_FILES = [f"{part}/*.{kind}" for part in ("transformer", "vae") for kind in ("json", "safetensors")]


def fetch(source: str, patterns: list[str]) -> pathlib.Path:
    """The folder `source`, or a local copy of the files of that Hugging Face repository that match.

    Raises:
        WeightsError: if it is neither a folder nor a repository that can be reached.
    """
    if pathlib.Path(source).is_dir():
        return pathlib.Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise WeightsError(f"--source={source} is not a folder, nor the name of a Hugging Face repository (owner/name)")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise WeightsError("fetching a repository needs: pip install 'mimic-video-jax[convert]'") from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:  # refusals, no network, nothing cached
        raise WeightsError(f"--source={source} is not a folder, and could not be fetched from Hugging Face: {error}") from error


def only_file(source: pathlib.Path, flag: flags.FlagHolder) -> pathlib.Path:
    """The one file that a flag's pattern means. Raises WeightsError, listing the candidates, if it is none or several."""
    pattern = flag.value
    if pathlib.Path(pattern).is_absolute():
        raise WeightsError(f"--{flag.name}={pattern} is absolute; expected a pattern relative to --source={source}")
    found = sorted(path for path in source.glob(pattern) if path.is_file())
    if len(found) == 1:
        return found[0]
    candidates = found or sorted(source.rglob(f"*{pathlib.Path(pattern).suffix}"))
    listed = "".join(f"\n  {path.relative_to(source)}" for path in candidates) or " none"
    raise WeightsError(f"--{flag.name}={pattern} matches {len(found)} files of {source}; expected one. Candidates:{listed}")


def published_weights(config: ExperimentConfig, source: pathlib.Path) -> Params:
    """The networks of `config.stage` from the layout of the published repository."""
    shapes = network_shapes(config)
    flags_and_names = {"tokenizer": (_TOKENIZER, WAN_VAE_NAMES), "backbone": (_BACKBONE, VIDEO_DIT_NAMES)}
    if config.stage == "action":
        flags_and_names["decoder"] = (_DECODER, ACTION_DECODER_NAMES)
    files = {name: only_file(source, flag) for name, (flag, _) in flags_and_names.items()}
    params = {}
    for name, (_, names) in flags_and_names.items():
        file = str(files[name])
        tensors = without_prefix(open_tensors(file), ema=_EMA.value and name != "tokenizer", source=file)
        tensors = fuse_lora(tensors, _LORA_ALPHA.value, source=file)
        params[name] = import_params(tensors, names, shapes[name], source=file)
        print(f"{name}: {file}")
    return params


def diffusers_weights(config: ExperimentConfig, source: pathlib.Path) -> Params:
    """Tokenizer and backbone from diffusers' layout. Raises ConfigError if they are not those that are configured."""
    shapes = network_shapes(config)
    there = dataclasses.replace(
        config,
        backbone=video_dit_config(read_component(source, "transformer"), config.backbone.hidden_block),
        tokenizer=wan_config(read_component(source, "vae")),
    )
    directory.require_same_model(there, config, source, "tokenizer", "backbone")
    params = {}
    for name, part, names in (("tokenizer", "vae", DIFFUSERS_VAE_NAMES), ("backbone", "transformer", DIFFUSERS_DIT_NAMES)):
        params[name] = import_params(open_tensors(source / part), names, shapes[name], source=str(source / part))
        print(f"{name}: {source / part}")
    return params


def network_shapes(config: ExperimentConfig) -> Params:
    return jax.eval_shape(VideoActionModel(config).init, jax.random.key(0))


def read_statistics(path: pathlib.Path, config: ExperimentConfig) -> dict[str, Statistics]:
    """A statistics file, published or of a run, for the windows of this configuration.

    Raises:
        WeightsError: if it is no such file, or of another action space or horizon.
    """
    try:
        values = json.loads(path.read_text())
        statistics = from_json(values) if set(values) == {"action", "proprio"} else statistics_from_published(values)
    except (ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} is not a dataset statistics file: {error}") from error
    decoder = config.decoder
    expected = {"action": (config.data.action_horizon, decoder.action_dim), "proprio": (1, decoder.proprio_dim)}
    wrong = [
        f"'{key}' has shape {statistics[key].mean.shape}; the decoder expects {shape}"
        for key, shape in expected.items()
        if statistics[key].mean.shape != shape
    ]
    if wrong:
        raise WeightsError(f"the statistics of {path} are of other windows: " + "; ".join(wrong))
    return statistics


def convert(config: ExperimentConfig) -> None:
    """Published weights → run directory."""
    flags_of_stage = {"decoder": _DECODER.value, "statistics": _STATISTICS.value}
    wrong = [f"--{flag}" for flag, value in flags_of_stage.items() if (value is None) == (config.stage == "action")]
    if _SOURCE.value is None:
        raise WeightsError("--source is missing: the folder or Hugging Face repository to convert")
    if wrong:
        needed = "needs" if config.stage == "action" else "has no use for"
        raise WeightsError(f"stage '{config.stage}' {needed} {' and '.join(wrong)}")
    if config.stage == "action" and _BACKBONE.value is None:
        raise WeightsError("stage 'action' needs --backbone")
    if config.tokenizer.kind != "wan":
        raise ConfigError(f"config field 'tokenizer.kind' is {config.tokenizer.kind!r}; expected 'wan', the published one")
    out = run_path(_OUT.value)
    directory.require_empty(out)
    embodiments = None
    if _BACKBONE.value is None:
        params = diffusers_weights(config, fetch(_SOURCE.value, _DIFFUSERS_FILES))
    else:
        patterns = [pattern for pattern in (_TOKENIZER.value, _BACKBONE.value, *flags_of_stage.values()) if pattern]
        source = fetch(_SOURCE.value, patterns)
        if config.stage == "action":
            file = only_file(source, _STATISTICS)
            raw_dims = {"action": config.data.raw_action_dims, "proprio": config.data.raw_proprio_dims}
            embodiments = {file.stem: Embodiment(file.stem, 0, read_statistics(file, config), raw_dims)}
        params = published_weights(config, source)
    checkpoints.save_converted(out, config, params, embodiments)
    print(f"wrote {out}")


def export(run: epath.Path, out: pathlib.Path) -> None:
    """Run directory → files with published names."""
    run, config = absolute(run), directory.read_config(run)
    statistics = None
    if config.stage == "action":
        statistics = exported_statistics(choose(directory.load_embodiments(run), None).statistics)
    params, step = checkpoints.load_params(run, _PRECISION.value)
    print(f"step {step} of {run}")
    for line in write_networks(out, run.name, config, params, _FORMAT.value):
        print(line)
    if statistics is not None:
        path = out / "dataset_statistics" / f"{run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        directory.write_json(path, statistics)
        print(f"wrote {path}")


def exported_statistics(statistics: Mapping[str, Statistics]) -> dict:
    return statistics_to_published(statistics, _ROBOT.value) if _ROBOT.value else to_json(statistics)


_ERRORS = (RunError, WeightsError, ModuleNotFoundError)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax and JAX narrate
    assert _RUN.value is not None  # or this is not called
    try:
        export(run_path(_RUN.value), local_path(_OUT.value))
    except (ConfigError, ValueError, *_ERRORS) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and an accelerator may be smaller than the weights
    if any(argument.partition("=")[0] in ("-run", "--run") for argument in sys.argv[1:]):
        app.run(main)
    else:
        experiment.run(convert, _ERRORS)
