"""Published weights → a run directory that every other command reads, and a run back into published files."""

import dataclasses
import json
import pathlib
import re

from etils import epath

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment, choose
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import absolute
from mimic_video.transforms import Statistics, from_json, statistics_from_published, statistics_to_published, to_json
from mimic_video.vam import Params, VideoActionModel
from mimic_video.weights.diffusers import DIFFUSERS_DIT_NAMES, read_component, video_dit_config, wan_config
from mimic_video.weights.files import open_tensors
from mimic_video.weights.layout import Format, write_networks
from mimic_video.weights.published import (
    ACTION_DECODER_NAMES,
    VIDEO_DIT_NAMES,
    WeightsError,
    fuse_lora,
    import_params,
    without_prefix,
)
from mimic_video.weights.wan_names import DIFFUSERS_VAE_NAMES, WAN_VAE_NAMES


@dataclasses.dataclass(frozen=True)
class Patterns:
    """Which files of a source in the published layout hold what; each matches one, relative to the source."""

    tokenizer: str
    backbone: str | None  # None for a source in diffusers' format
    decoder: str | None  # this and the next for stage `action`
    statistics: str | None


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


def only_file(source: pathlib.Path, name: str, pattern: str) -> pathlib.Path:
    """The one file that the pattern of the flag `name` means. Raises WeightsError, listing the candidates, unless it is one."""
    if pathlib.Path(pattern).is_absolute():
        raise WeightsError(f"--{name}={pattern} is absolute; expected a pattern relative to --source={source}")
    found = sorted(path for path in source.glob(pattern) if path.is_file())
    if len(found) == 1:
        return found[0]
    candidates = found or sorted(source.rglob(f"*{pathlib.Path(pattern).suffix}"))
    listed = "".join(f"\n  {path.relative_to(source)}" for path in candidates) or " none"
    raise WeightsError(f"--{name}={pattern} matches {len(found)} files of {source}; expected one. Candidates:{listed}")


def published_weights(config: ExperimentConfig, source: pathlib.Path, patterns: Patterns, ema: bool, lora_alpha: float) -> Params:
    """The networks of `config.stage` from the layout of the published repository.

    Args:
        ema: takes the moving average of the backbone and the decoder.
        lora_alpha: of the LoRA layers of a checkpoint that is not fused.
    """
    shapes, networks = VideoActionModel(config).shapes, {"tokenizer": WAN_VAE_NAMES, "backbone": VIDEO_DIT_NAMES}
    if config.stage == "action":
        networks["decoder"] = ACTION_DECODER_NAMES
    files = {name: str(only_file(source, name, getattr(patterns, name))) for name in networks}
    params = {}
    for name, names in networks.items():
        file = files[name]
        tensors = without_prefix(open_tensors(file), ema=ema and name != "tokenizer", source=file)
        params[name] = import_params(fuse_lora(tensors, lora_alpha, source=file), names, shapes[name], source=file)
        print(f"{name}: {file}")
    return params


def diffusers_weights(config: ExperimentConfig, source: pathlib.Path) -> Params:
    """Tokenizer and backbone from diffusers' layout. Raises ConfigError if they are not those that are configured."""
    shapes = VideoActionModel(config).shapes
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


def read_statistics(path: pathlib.Path, config: ExperimentConfig) -> dict[str, Statistics]:
    """A statistics file, published or of a run, for the windows of this configuration.

    Raises:
        WeightsError: if it is no such file, or of another action space or horizon.
        ConfigError: for published ones without the published clamp, which their decoder presupposes.
    """
    try:
        values = json.loads(path.read_bytes())
        published = set(values) != {"action", "proprio"}
        statistics = statistics_from_published(values) if published else from_json(values)
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
    if published and not config.compat.percentile_clamp:
        raise ConfigError(
            f"config field 'compat.percentile_clamp' is False; expected True, since {path} has published statistics"
        )
    return statistics


def import_weights(
    config: ExperimentConfig, source: str | None, run: epath.Path, patterns: Patterns, ema: bool, lora_alpha: float
) -> None:
    """Published weights → run directory.

    Raises:
        WeightsError, ConfigError: naming the flag of launch/convert.py or the field that is wrong.
    """
    of_stage = {"decoder": patterns.decoder, "statistics": patterns.statistics}
    wrong = [f"--{flag}" for flag, value in of_stage.items() if (value is None) == (config.stage == "action")]
    if source is None:
        raise WeightsError("--source is missing: the folder or Hugging Face repository to convert")
    if wrong:
        needed = "needs" if config.stage == "action" else "has no use for"
        raise WeightsError(f"stage '{config.stage}' {needed} {' and '.join(wrong)}")
    if config.stage == "action" and patterns.backbone is None:
        raise WeightsError("stage 'action' needs --backbone")
    if config.tokenizer.kind != "wan":
        raise ConfigError(f"config field 'tokenizer.kind' is {config.tokenizer.kind!r}; expected 'wan', the published one")
    directory.require_empty(run)
    embodiments = None
    if patterns.backbone is None:
        params = diffusers_weights(config, fetch(source, _DIFFUSERS_FILES))
    else:
        folder = fetch(source, [pattern for pattern in dataclasses.astuple(patterns) if pattern])
        if patterns.statistics is not None:
            file = only_file(folder, "statistics", patterns.statistics)
            raw_dims = {"action": config.data.raw_action_dims, "proprio": config.data.raw_proprio_dims}
            embodiments = {file.stem: Embodiment(file.stem, 0, read_statistics(file, config), raw_dims)}
        params = published_weights(config, folder, patterns, ema, lora_alpha)
    checkpoints.save_converted(run, config, params, embodiments)
    print(f"wrote {run}")


def export_weights(
    run: epath.Path, out: pathlib.Path, form: Format, precision: checkpoints.Precision, published_keys: str | None
) -> None:
    """Run directory → files with published names.

    Args:
        published_keys: the published robot under whose keys statistics are written; None for those of a run.
    """
    run, config = absolute(run), directory.read_config(run)
    statistics = None
    if config.stage == "action":
        if published_keys and not config.compat.percentile_clamp:
            raise WeightsError(
                f"--published_keys={published_keys} of {run}, whose 'compat.percentile_clamp' is False; expected True: who reads "
                "those keys normalises with the clamp"
            )
        own = choose(directory.load_embodiments(run), None).statistics
        statistics = statistics_to_published(own, published_keys) if published_keys else to_json(own)
    params, step = checkpoints.load_params(run, precision)
    print(f"step {step} of {run}")
    for line in write_networks(out, run.name, config, params, form):
        print(line)
    if statistics is not None:
        path = out / "dataset_statistics" / f"{run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        directory.write_json(path, statistics)
        print(f"wrote {path}")
