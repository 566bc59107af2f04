"""Training metrics: norms by group of parameters, memory, and where numbers and pictures go."""

import contextlib
import http.client
import importlib
import json
import pathlib
import re
import secrets
import types
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from jaxtyping import Array, Float, UInt8

from mimic_video.atomic import atomically
from mimic_video.config import ConfigError, ExperimentConfig, to_dict
from mimic_video.runs.directory import read_metrics
from mimic_video.runs.storage import Spool, in_bucket
from mimic_video.trees import path_name

# (regex over the '/'-joined path, group); the first match wins.
_GROUPS = (
    (r"blocks/\w+_modulation", "blocks/modulation"),
    (r"blocks/(self_attn|cross_attn|mlp)", r"blocks/\1"),
    (r"final_", "final"),
    (r"", "embeddings"),  # of patches, actions, proprioception, positions, and times
)


_FINISH_SECONDS = 300.0  # for what Weights & Biases has not been sent when a run ends; `wandb sync` sends the rest
_NO_SERVER = ("offline", "dryrun", "disabled")  # modes of it
_ANSWER_SECONDS = 10.0  # that its server may take


def group_norms(tree: Any, prefix: str) -> dict[str, Float[Array, ""]]:
    """Euclidean norms of a tree of parameters, or of their gradients, by group.

    Returns:
        Norms under names such as 'grad_norm/backbone/blocks/self_attn', with the prefix 'grad_norm': for every network at the top
        of the tree those of its blocks' self_attn, cross_attn, mlp and modulation, of its embeddings and of its final layers.
    """
    groups: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        network, name = path_name(path).split("/", 1)
        group = next(match.expand(group) for pattern, group in _GROUPS if (match := re.search(pattern, name)))
        groups.setdefault(f"{prefix}/{network}/{group}", []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in groups.items()}


def device_memory() -> dict[str, float]:
    """GB in use and at most in use so far, of the fullest device of this process; nothing where devices do not say (CPU)."""
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"hbm_gb": "bytes_in_use", "hbm_gb_peak": "peak_bytes_in_use"}
    return {name: max(each[key] for each in stats) / 1e9 for name, key in names.items() if stats}


class MetricWriter:
    """Appends one record per logged step to metrics.jsonl, TensorBoard and, if configured, Weights & Biases.

    A context manager; of several processes the first one writes. After a resume, records of steps that will be repeated are
    dropped first. Weights & Biases cannot drop any: there the same run goes on (its id is in the run directory) and keeps what it
    has of those steps. Whatever happens to it, or to the network, the run goes on.

    Attributes:
        folder: the run directory or, of one in a bucket, a local one whose files every record takes there with it.
    """

    def __init__(self, run: epath.Path, start_step: int, config: ExperimentConfig):
        self._first = jax.process_index() == 0
        if not self._first:
            return
        from tensorboardX import SummaryWriter  # only in the process that writes: it imports PyTorch, if that is installed

        self._spool = Spool(run)
        self.folder = self._spool.path
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        kept = [record for record in read_metrics(run) if record["step"] <= start_step]
        with atomically(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._wandb = _wandb_run(run, config) if config.train.wandb_project else None
        self._file = path.open("a")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._first:
            return
        self._file.close()
        self._board.close()
        with self._wandb_or_warning():
            if self._wandb is not None:
                self._wandb.finish()
        self._spool.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._first:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._spool.publish()
        self._to_wandb(step, values)

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard and Weights & Biases."""
        if not self._first:
            return
        self._board.add_image(name, image, step, dataformats="HWC")
        self._to_wandb(step, {name: image})

    def _to_wandb(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        with self._wandb_or_warning():
            if self._wandb is not None and step >= self._wandb.step:
                images = {name: wandb_package().Image(value) for name, value in values.items() if isinstance(value, np.ndarray)}
                self._wandb.log({**values, **images}, step=step)

    @contextlib.contextmanager
    def _wandb_or_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of its package or the process that this has started, of many kinds
            logging.warning("Weights & Biases gets no more metrics of this start, %s has them: %r", self._file.name, error)
            self._wandb = None


def wandb_package() -> types.ModuleType:
    """Weights & Biases. Raises ConfigError, saying how to install it, if it is missing."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "config field 'train.wandb_project' is set, but the package wandb is missing; expected after "
            "pip install 'mimic-video-jax[wandb]'"
        ) from error


def require_wandb(project: str) -> None:
    """Asks for what Weights & Biases needs, while nothing has been read. Without a network a run goes on, and keeps its metrics.

    Raises:
        ConfigError: if its package is missing, its settings are wrong, or there is no key, or one that its server does not take.
    """
    wandb = wandb_package()
    try:
        wandb.Settings(project=project)
        if not _unreachable(wandb.setup().settings):
            wandb.login()
    except Exception as error:  # of wandb, of pydantic, which reads the environment, and of the process that is started
        raise ConfigError(
            f"config field 'train.wandb_project' is {project!r}, but that cannot be used: {' '.join(str(error).split())}; "
            "expected a key (wandb login, or WANDB_API_KEY), or WANDB_MODE=offline"
        ) from error


def _unreachable(settings: Any) -> str | None:
    """Why the server in the settings of Weights & Biases cannot be reached; None if it can, or is not to be (WANDB_MODE)."""
    if settings.mode in _NO_SERVER:
        return None
    try:
        urllib.request.urlopen(settings.base_url, timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:  # an answer
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{settings.base_url} cannot be reached: {error}"
    return None


def _wandb_run(run: epath.Path, config: ExperimentConfig) -> Any:
    """The run's run at Weights & Biases, which goes on if there is one. A bucket does not get its files."""
    wandb, path = wandb_package(), run / "wandb_id"
    if not path.exists() or not re.fullmatch(r"[\w-]+", path.read_text()):  # a power cut may have left zeros
        path.write_text(secrets.token_hex(8))
    values = {
        "project": config.train.wandb_project,
        "id": path.read_text(),
        "name": run.name,
        "resume": "allow",
        "dir": None if in_bucket(run) else str(run),
        "config": to_dict(config),
    }
    settings = wandb.setup().settings
    # Its own end waits for a network that has gone for as long as that takes, in the versions that can do otherwise, too.
    impatient = settings.mode not in _NO_SERVER and getattr(settings, "finish_timeout", None) == 0
    reason = _unreachable(settings)
    if not reason:
        try:
            return wandb.init(**values, settings={"finish_timeout": _FINISH_SECONDS} if impatient else {})
        except wandb.errors.Error as error:  # of a network that has just gone, or is too slow
            reason = str(error)
    offline = wandb.init(**values, mode="offline")
    folder = pathlib.Path(offline.dir).parent
    logging.warning("metrics do not go to Weights & Biases now (%s); `wandb sync %s` sends them", reason, folder)
    return offline
