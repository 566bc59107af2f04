"""Trains one stage of an experiment, or continues it.

    python launch/train.py --config=configs/quickstart.py:video --workdir=runs/video
    python launch/train.py --config=configs/quickstart.py:action --config.backbone_run=runs/video --workdir=runs/action

The same command after an interruption continues from the last checkpoint and ends with the same parameters.
"""

import pathlib

import experiment
import jax
import numpy as np
from absl import flags
from flax import nnx

from data_pipelines.loader import WindowDataset, make_batches, open_windows
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.statistics import action_statistics, load_statistics, save_statistics
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.models.patch_tokenizer import PatchTokenizer
from mimic_video.models.text import make_text_encoder
from mimic_video.policy.policy import make_normalizers
from mimic_video.training import checkpoints
from mimic_video.training.loop import train
from mimic_video.vam import Params, VideoActionModel

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory", required=True)
_VALIDATION_BATCHES = 4
_BACKBONE_FIELDS = ("data.image_size", "data.past_frames", "data.future_frames", "data.video_hz", *checkpoints.MODEL_FIELDS)


def fit_tokenizer(config: ExperimentConfig, windows: WindowDataset) -> Params:
    """Parameters of a tokenizer fitted to evenly spaced windows."""
    chosen = np.linspace(0, len(windows) - 1, min(config.tokenizer.fit_windows, len(windows))).astype(int)
    video = np.stack([windows[int(index)]["video"] for index in chosen]).astype(np.float32) / 127.5 - 1
    tokenizer = PatchTokenizer()
    unexplained = tokenizer.fit(video)
    print(f"tokenizer: unexplained variance {unexplained[0]:.1%} of first frames, {unexplained[1]:.1%} of the others")
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param)))


def initial_params(config: ExperimentConfig, windows: WindowDataset) -> Params:
    """Random networks, and the tokenizer and backbone of a `backbone_run`."""
    params = VideoActionModel(config).init(jax.random.key(config.seed))
    if config.backbone_run:
        run = pathlib.Path(config.backbone_run)
        pretrained, step = checkpoints.load_params(run, "float32" if config.stage == "video" else "configured")
        print(f"backbone: step {step} of {run}")
        return params | {name: pretrained[name] for name in ("tokenizer", "backbone")}
    return params | {"tokenizer": fit_tokenizer(config, windows)}


def main(config: ExperimentConfig) -> None:
    run = pathlib.Path(_WORKDIR.value)
    if config.tokenizer.kind == "wan" and not config.backbone_run:
        raise ConfigError("config field 'backbone_run' is empty; expected a run with the weights of the Wan tokenizer")
    if config.backbone_run:
        backbone = pathlib.Path(config.backbone_run)
        checkpoints.require_same_model(checkpoints.read_config(backbone), config, _BACKBONE_FIELDS, backbone)
        checkpoints.require_checkpoint(backbone)
    windows = open_windows(config, config.data.train_split)
    encode_text = make_text_encoder(config.text)
    for instruction in {episode.instruction for episode in windows.episodes}:
        encode_text(instruction)  # so that one that does not fit is an error now
    checkpoints.write_config(run, config)
    normalizers = None
    if config.stage == "action":
        statistics = run / "statistics.json"
        if not statistics.exists():
            save_statistics(statistics, action_statistics(windows.episodes, config.data))
        normalizers = make_normalizers(load_statistics(statistics), config)

    def batches(windows: WindowDataset, seed: int, start_step: int):
        return make_batches(
            windows, batch_size=config.train.batch_size, seed=seed, start_step=start_step, text=encode_text,
            normalizers=normalizers, process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    validation = []
    if config.train.validate_every:
        stream = batches(open_windows(config, config.data.validation_split), 0, 0)
        validation = [next(stream) for _ in range(_VALIDATION_BATCHES)]
    train(config, run, lambda: initial_params(config, windows), lambda step: batches(windows, config.seed, step), validation)


if __name__ == "__main__":
    experiment.run(main, (DatasetError, checkpoints.RunError))
