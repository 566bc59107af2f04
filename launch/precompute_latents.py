"""Encodes every window that a stage trains on once, so that training reads latents instead of frames.

    python launch/precompute_latents.py --config=configs/yours.py:action --config.backbone_run=runs/video \\
        --config.data.latents=runs/latents
    python launch/train.py --config=configs/yours.py:action --config.backbone_run=runs/video \\
        --config.data.latents=runs/latents --workdir=runs/action

The tokenizer is that of `backbone_run`, the splits are those that training reads. Of a slice such as `train[:50]` only the shards
with its windows are made, in the folder of the whole split, where other slices find them. With --stride=4 only every fourth step
of an episode becomes a window of training. What is there already is kept, so the same command continues after an interruption;
--shard=0/8 to --shard=7/8 divide the work among processes or machines that share the folder.

Windows are encoded as training would, `train.batch_size` of them at once over the devices of `mesh`. Another number, which
--config.train.batch_size gives, rounds differently in the last place.
"""

import re
import time

import experiment
import numpy as np
from absl import flags

from data_pipelines.datasets import create_caches
from data_pipelines.precompute import fill_latents
from data_pipelines.sources.rlds import DatasetError
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, run_path
from mimic_video.training.steps import make_encoder
from mimic_video.vam import VideoActionModel

_STRIDE = flags.DEFINE_integer("stride", 1, "Steps of an episode from one window to the next", lower_bound=1)
_SHARD = flags.DEFINE_string("shard", "0/1", "i/n: the i-th of n equal parts of the work, counted from 0")


def parse_share(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ConfigError unless 0 ≤ i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard is {text!r}; expected i/n with i from 0 to n - 1, such as 0/8")
    return int(match[1]), int(match[2])


def main(config: ExperimentConfig) -> None:
    if not config.data.latents:
        raise ConfigError("config field 'data.latents' is empty; expected the folder to fill")
    (share, shares), backbone = parse_share(_SHARD.value), run_path(config.backbone_run)
    directory.require_same_model(directory.read_config(backbone), config, backbone, "tokenizer")
    tokenizer, dtype = checkpoints.load_tokenizer(backbone, config), VideoActionModel(config).dtype("tokenizer")
    caches = create_caches(config, tokenizer, _STRIDE.value, dtype.name)
    todo = [[shard for shard in cache.missing(read) if shard % shares == share] for cache, _, read in caches]
    for (cache, *_), shards in zip(caches, todo, strict=True):
        size = int(np.prod(cache.shape)) * dtype.itemsize
        print(
            f"{cache.folder}: {cache.rows} windows of {size / 1e6:.3g} MB, {cache.rows * size / 1e9:.3g} GB in "
            f"{cache.num_shards} shards, of which {len(shards)} are to be made here",
            flush=True,
        )
    encode, start = make_encoder(config, tokenizer), time.perf_counter()
    for (cache, windows, _), shards in zip(caches, todo, strict=True):
        if shards:
            fill_latents(cache, shards, windows.episodes, config, encode)
    left = sum(len(cache.missing(read)) for cache, _, read in caches)
    print(
        f"made {sum(map(len, todo))} shards in {time.perf_counter() - start:.0f} s; "
        + (f"{left} are missing, of other parts of the work" if left else "the latents are complete")
    )


if __name__ == "__main__":
    experiment.run(main, (DatasetError, RunError))
