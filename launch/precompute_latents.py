"""Encodes every window that a stage trains on once, so that training reads latents instead of frames.

    python launch/precompute_latents.py --config=configs/yours.py:action --config.backbone_run=runs/video \\
        --config.data.latents=runs/latents
    python launch/train.py --config=configs/yours.py:action --config.backbone_run=runs/video \\
        --config.data.latents=runs/latents --workdir=runs/action

The tokenizer is that of `backbone_run`, the splits are those that training reads. With --stride=4 only every fourth step of an
episode becomes a window of training. What is there already is kept, so the same command continues after an interruption;
--shard=0/8 to --shard=7/8 divide the work among processes or machines that share the folder.

Windows are encoded as training would, `train.batch_size` of them at once over the devices of `mesh`. Another number, which
--config.train.batch_size gives, rounds differently in the last place.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence

import experiment
import grain
import jax
import numpy as np
from absl import flags, logging
from tqdm import tqdm

from data_pipelines.datasets import latents_folder, open_datasets
from data_pipelines.loader import WindowDataset
from data_pipelines.precompute import LatentCache, create_latents, first_rows, latent_key
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.windows import video_window
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.parallel.sharding import global_batch, make_mesh, place, require_divisible
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, run_path
from mimic_video.vam import Params, VideoActionModel

_STRIDE = flags.DEFINE_integer("stride", 1, "Steps of an episode from one window to the next", lower_bound=1)
_SHARD = flags.DEFINE_string("shard", "0/1", "i/n: the i-th of n equal parts of the work, counted from 0")


def parse_share(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ConfigError unless 0 ≤ i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard is {text!r}; expected i/n with i from 0 to n - 1, such as 0/8")
    return int(match[1]), int(match[2])


def make_encoder(config: ExperimentConfig, tokenizer: Params) -> Callable[[np.ndarray], np.ndarray]:
    """`train.batch_size` windows of frames → their latents, in the dtype that the tokenizer computes in."""
    vam, mesh = VideoActionModel(config), make_mesh(config.mesh)
    require_divisible(config.train.batch_size, mesh)
    params, dtype = place({"tokenizer": tokenizer}, mesh), vam.dtype("tokenizer")
    encode = jax.jit(lambda params, video: vam.encode_video(params, video).astype(dtype))
    return lambda video: np.array(encode(params, global_batch(video, mesh)))


def read_batches(windows: WindowDataset, config: ExperimentConfig, rows: Sequence[int], stride: int) -> Iterator[dict]:
    """`video` and `broken` (b,) of those rows of a cache, read ahead by threads; the last row fills up the last batch."""
    first, size, shape = first_rows(list(map(len, windows.episodes)), stride), config.train.batch_size, config.data.image_size

    def read(row: int) -> dict:
        episode = int(np.searchsorted(first, row, side="right")) - 1
        try:
            video = video_window(windows.episodes[episode], (row - int(first[episode])) * stride, config.data)["video"]
        except DatasetError as error:
            if not config.data.skip_broken:
                raise
            logging.warning("skipped a window: %s", error)
            return {"video": np.zeros((len(config.data.cameras), config.data.num_frames, *shape, 3), np.uint8), "broken": True}
        return {"video": video, "broken": False}

    padded = [*rows, *[rows[-1]] * (-len(rows) % size)]
    ahead = grain.ReadOptions(num_threads=min(16, os.cpu_count() or 1), prefetch_buffer_size=size)
    return iter(grain.MapDataset.source(padded).map(read).to_iter_dataset(ahead).batch(size))


def precompute(
    cache: LatentCache,
    shards: Sequence[int],
    windows: WindowDataset,
    config: ExperimentConfig,
    encode: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Fills in shards, with a progress bar. Of windows that `data.skip_broken` skips the latents are NaN."""
    rows = [row for shard in shards for row in cache.rows_of(shard)]

    def latents() -> Iterator[np.ndarray]:
        with tqdm(total=len(rows), desc=str(cache.folder), unit="window") as progress:
            for batch in read_batches(windows, config, rows, cache.stride):
                encoded = encode(batch["video"])
                encoded[batch["broken"]] = np.nan
                progress.update(min(len(encoded), len(rows) - progress.n))
                yield from encoded

    cache.write(shards, latents())


def main(config: ExperimentConfig) -> None:
    if not config.data.latents:
        raise ConfigError("config field 'data.latents' is empty; expected the folder to fill")
    (share, shares), backbone = parse_share(_SHARD.value), run_path(config.backbone_run)
    directory.require_same_model(directory.read_config(backbone), config, backbone, "tokenizer")
    tokenizer = checkpoints.load_tokenizer(backbone, config)
    (frames, height, *rest), dtype = config.latent_shape, VideoActionModel(config).dtype("tokenizer")
    shape = (frames, config.data.views * height, *rest)
    splits = [config.data.train_split] + [config.data.validation_split] * bool(config.train.validate_every)

    work: list[tuple[LatentCache, list[int], WindowDataset]] = []
    for split in splits:
        for name, windows in open_datasets(config, split).windows.items():
            rows = int(first_rows(list(map(len, windows.episodes)), _STRIDE.value)[-1])
            cache = create_latents(
                latents_folder(config, name, split),
                latent_key(config, tokenizer, windows.identity),
                stride=_STRIDE.value,
                rows=rows,
                shape=shape,
                dtype=dtype.name,
            )
            shards = [shard for shard in cache.missing() if shard % shares == share]
            work.append((cache, shards, windows))
            size = int(np.prod(shape)) * dtype.itemsize
            print(
                f"{cache.folder}: {rows} windows of {size / 1e6:.3g} MB, {rows * size / 1e9:.3g} GB in {cache.num_shards} "
                f"shards, of which {len(shards)} are to be made here",
                flush=True,
            )

    encode, start = make_encoder(config, tokenizer), time.perf_counter()
    for cache, shards, windows in work:
        if shards:
            precompute(cache, shards, windows, config, encode)
    left = sum(len(cache.missing()) for cache, *_ in work)
    print(
        f"made {sum(len(shards) for _, shards, _ in work)} shards in {time.perf_counter() - start:.0f} s; "
        + (f"{left} are missing, of other parts of the work" if left else "the latents are complete")
    )


if __name__ == "__main__":
    experiment.run(main, (DatasetError, RunError))
