"""Where a repository of published weights keeps which network (SPEC 11)."""

import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from mimic_video.config import ExperimentConfig
from mimic_video.weights.files import write_pt, write_safetensors
from mimic_video.weights.published import ACTION_DECODER_NAMES, VIDEO_DIT_NAMES, Names, export_params, published_shapes
from mimic_video.weights.wan_names import WAN_VAE_NAMES

Format = Literal["safetensors", "pt"]


def write_networks(out: pathlib.Path, name: str, config: ExperimentConfig, params: dict[str, Any], form: Format) -> Iterator[str]:
    """Writes networks with their published tensor names, and says for each where it is.

    Args:
        name: of the files of the backbone and the decoder.
        params: of the networks; each is taken out when it has been written, so that its memory goes.
    """
    if config.tokenizer.kind == "wan":
        file = "tokenizer.pth" if form == "pt" else f"tokenizer.{form}"
        yield _write(out / "video_backbone" / "tokenizer" / file, params.pop("tokenizer"), WAN_VAE_NAMES, "", form)
    else:
        yield f"tokenizer: the kind '{config.tokenizer.kind}' has no published form; not exported"
    yield _write(out / "video_backbone" / f"{name}.{form}", params.pop("backbone"), VIDEO_DIT_NAMES, "net.", form)
    if "decoder" in params:
        yield _write(out / "action_decoder" / f"{name}.{form}", params.pop("decoder"), ACTION_DECODER_NAMES, "net.", form)


def _write(path: pathlib.Path, params: dict[str, Any], names: Names, prefix: str, form: Format) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {prefix + name: struct for name, struct in published_shapes(names, params).items()}
    tensors = ((prefix + name, array) for name, array in export_params(params, names))
    del params  # so that each parameter goes when it has been written
    if form == "pt":
        write_pt(path, tensors)
    else:
        write_safetensors(path, shapes, tensors)
    return f"wrote {path}: {len(shapes)} tensors"
