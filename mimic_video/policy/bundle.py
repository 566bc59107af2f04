"""Policy bundles: one directory with all that a policy needs, and the checksum of every file.

    bundle/manifest.json    format, version, the run's step, and {path: {"sha256", "bytes"}} of every other file
    bundle/config.json      the resolved configuration; parameters are in its `precision` and `policy.weights`
    bundle/embodiments.json the robots, with the statistics that normalise their actions and proprioception
    bundle/params/          orbax: tokenizer, backbone and decoder, adapters merged, averaged where the run kept an average
    bundle/text/            features of known instructions, one file each
    bundle/stablehlo/       optional: compiled programs' sources, see policy/stablehlo.py
    bundle/safetensors/     optional: the networks in the published names

A bundle is written beside its place and moved there when it is complete. Reading one needs no training data, nor what reads them.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float

from mimic_video.atomic import atomically
from mimic_video.config import ConfigError, ExperimentConfig, TextConfig, to_dict
from mimic_video.embodiments import Embodiment
from mimic_video.models.protocols import TextEncoder
from mimic_video.models.text import FeatureCache, make_text_encoder
from mimic_video.runs.arrays import load_tree, tree_args, tree_handler
from mimic_video.runs.directory import load_embodiments, read_config, save_embodiments, write_json
from mimic_video.runs.storage import RunError, absolute
from mimic_video.vam import Params, VideoActionModel

FORMAT, VERSION = "mimic-video policy", 1
_MANIFEST = "manifest.json"


class BundleError(RunError):
    """A bundle that cannot be used. The message names the file."""


class Bundle(NamedTuple):
    """What a policy is made of."""

    config: ExperimentConfig
    params: Params
    embodiments: dict[str, Embodiment]
    encode_text: TextEncoder


class KnownText:
    """Features of known instructions; of others by the configured encoder, which is made when the first one comes.

    The empty instruction, which programs are compiled and measured with, has rows of zeros unless it is known.
    """

    def __init__(self, features: FeatureCache, config: TextConfig, width: int):
        self._features, self._config, self._width = features, config, width
        self._encoder: TextEncoder | None = None

    def __call__(self, instruction: str) -> Float[np.ndarray, "rows width"]:
        """Raises ConfigError if the instruction is not known and the encoder cannot be made."""
        known = self._features.get(instruction)
        if known is not None:
            return np.pad(known, [(0, self._config.rows - len(known)), (0, 0)])
        if not instruction:
            return np.zeros((self._config.rows, self._width), np.float32)
        if self._encoder is None:
            try:
                self._encoder = make_text_encoder(self._config, self._width)
            except ConfigError as error:
                raise ConfigError(
                    f"instruction {instruction!r} is not one that the bundle has features of (launch/export.py "
                    f"--prompts adds them), and there is no encoder: {error}"
                ) from error
        return self._encoder(instruction)


def is_bundle(path: epath.Path) -> bool:
    """Whether the directory is a bundle, perhaps one that lacks its manifest."""
    return (path / _MANIFEST).exists() or (path / "params").is_dir()


@contextlib.contextmanager
def new_bundle(out: pathlib.Path, step: int) -> Iterator[pathlib.Path]:
    """A directory to write a bundle's files to; it becomes `out`, with a manifest, when the block ends without an error.

    Args:
        step: of the run, for the manifest.

    Raises:
        BundleError: if `out` is there already and not an empty directory.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BundleError(f"{out} exists; a bundle goes to a directory of its own")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomically(out) as partial:
        partial.mkdir()
        yield partial
        files = {name: {"sha256": digest, "bytes": (partial / name).stat().st_size} for name, digest in _digests(partial).items()}
        write_json(partial / _MANIFEST, {"format": FORMAT, "version": VERSION, "step": step, "files": files})


def write_policy(
    folder: pathlib.Path,
    config: ExperimentConfig,
    params: Params,
    embodiments: Mapping[str, Embodiment],
    text: Mapping[str, Float[np.ndarray, "rows width"]],
) -> None:
    """All that `read_bundle` reads.

    Args:
        folder: from `new_bundle`.
        params: of all three networks, as of `VideoActionModel.policy_params`.
        text: features of instructions.
    """
    write_json(folder / "config.json", to_dict(config))
    save_embodiments(folder, embodiments)
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        checkpointer.save(absolute(folder / "params"), args=tree_args(params))
    features = FeatureCache(folder / "text")
    for instruction, rows in text.items():
        used = np.flatnonzero(np.any(rows != 0, axis=1))
        features[instruction] = rows[: used[-1] + 1 if len(used) else 0]


def read_bundle(path: pathlib.Path) -> Bundle:
    """A bundle, every file of it verified, its parameters on this process's first device.

    Raises:
        BundleError: if a file is damaged, missing or not the bundle's, or the bundle is of a later version.
    """
    _verify(path)
    config = read_config(path)
    vam, device = VideoActionModel(config), SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(vam.policy_params, vam.shapes)
    params = load_tree(path / "params", jax.tree.map(lambda leaf: leaf.update(sharding=device), shapes))
    known = KnownText(FeatureCache(path / "text"), config.text, config.backbone.text_width)
    return Bundle(config, params, load_embodiments(path), known)


def _verify(path: pathlib.Path) -> None:
    file = path / _MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} has no {_MANIFEST}: it is not a complete bundle; export it again")
    try:
        manifest = json.loads(file.read_text())
        form, version, expected = manifest["format"], manifest["version"], manifest.get("files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file} is damaged: {error!r}; copy the bundle again") from error
    if form != FORMAT or not isinstance(version, int) or version > VERSION:
        raise BundleError(
            f"{file} says format {form!r}, version {version!r}; this version of mimic_video reads {FORMAT!r} up to "
            f"version {VERSION}: install a newer one, or export the run again"
        )
    if not isinstance(expected, dict):
        raise BundleError(f"{file} is damaged: it has no list of files; copy the bundle again")
    found = {str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir()} - {_MANIFEST}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"{name} is not one of its files" for name in sorted(found - expected.keys())]
    if not problems:
        problems = [
            f"{name} is not what was written" for name, digest in _digests(path).items() if digest != expected[name].get("sha256")
        ]
    if problems:
        raise BundleError(f"the bundle {path} is damaged: {'; '.join(problems[:5])}; copy it again, or export the run again")


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, in order of their paths; hashing runs in threads, beside each other."""
    files: list[Any] = sorted(item for item in folder.rglob("*") if item.is_file() and item != folder / _MANIFEST)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {str(file.relative_to(folder)): digest for file, digest in zip(files, pool.map(_digest, files), strict=True)}


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
