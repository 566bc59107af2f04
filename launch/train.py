"""Trains one stage of an experiment, or continues it.

    python launch/train.py --config=configs/quickstart.py:video --workdir=runs/video
    python launch/train.py --config=configs/quickstart.py:action --config.backbone_run=runs/video --workdir=runs/action

With --profile=100:110 the steps 100 to 110 are traced, for TensorBoard's profiler or Perfetto.

The same command after an interruption continues from the last checkpoint and ends with the same parameters. It is an error if the
datasets have changed in between, or if another run is using the directory.

SIGTERM, Ctrl-C and the notice of Google Compute Engine make it finish its step, save and end with exit code 75: start it again.

On several hosts it runs once on each, or once per GPU under SLURM, with one --workdir for all; `mimic_video.parallel.distributed`
says how the processes find each other, and that all of them end when one fails.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping

import experiment
import jax
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines.datasets import Datasets, open_datasets, with_latents
from data_pipelines.loader import Part, WindowDataset, data_state, make_batches
from data_pipelines.mixture import Mixture
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.statistics import Hosts, cached_statistics
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment
from mimic_video.models.patch_tokenizer import PatchTokenizer
from mimic_video.models.text import make_text_encoder
from mimic_video.parallel.distributed import processes
from mimic_video.parallel.sharding import batch_rows, make_mesh, shardings
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, run_path
from mimic_video.stages import TRAINED
from mimic_video.training.loop import NonFiniteLossError, train
from mimic_video.training.metrics import wandb_package
from mimic_video.training.preemption import EXIT_CODE, PreemptedError
from mimic_video.transforms import Normalizer
from mimic_video.trees import named_leaves
from mimic_video.vam import Params, VideoActionModel

Windows = Mapping[str, WindowDataset]

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, or gs://BUCKET/FOLDER", required=True)
_PROFILE = flags.DEFINE_string("profile", "", "FIRST:LAST, the steps of which a profiler's trace goes to WORKDIR/profile")


def fit_tokenizer(config: ExperimentConfig, datasets: Windows) -> Params:
    """Parameters of a tokenizer fitted to evenly spaced windows of all datasets."""
    every = [(windows, index) for windows in datasets.values() for index in range(len(windows))]
    chosen = np.linspace(0, len(every) - 1, min(config.tokenizer.fit_windows, len(every))).astype(int)
    samples = [every[i][0][every[i][1]] for i in chosen]
    views = [view for sample in samples for view in np.split(sample["video"], len(config.data.cameras), axis=1)]
    there = [there for sample in samples for there in sample.get("view_mask", [True])]
    video = np.stack(list(itertools.compress(views, there))).astype(np.float32) / 127.5 - 1
    tokenizer = PatchTokenizer()
    unexplained = tokenizer.fit(video)
    print(f"tokenizer: unexplained variance {unexplained[0]:.1%} of first frames, {unexplained[1]:.1%} of the others")
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param)))


def initial_params(config: ExperimentConfig, datasets: Windows, mesh: Mesh) -> Params:
    """Random networks on a mesh, but the tokenizer and backbone of a `backbone_run`, and what a `start_run` has."""
    vam, key, first = VideoActionModel(config), jax.random.key(config.seed), jax.process_index() == 0
    tree = jax.eval_shape(vam.init, key)
    shapes, where = named_leaves(tree), named_leaves(shardings(tree, mesh))
    if config.backbone_run:
        run = run_path(config.backbone_run)
        pretrained, step = checkpoints.load_params(run, checkpoints.START_PRECISION[config.stage], mesh)
        if first:
            print(f"backbone: step {step} of {run}")
        found = named_leaves({name: pretrained[name] for name in ("tokenizer", "backbone")})
    else:
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree["tokenizer"])
        tokenizer = fit_tokenizer(config, datasets) if first else blank
        found = named_leaves({"tokenizer": multihost_utils.broadcast_one_to_all(tokenizer)})
    if config.start_run:
        trained = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[name])
            for name, leaf in shapes.items()
            if name.startswith(f"{TRAINED[config.stage]}/")
        }
        started = checkpoints.load_start(run_path(config.start_run), config.start_map, trained, mesh)
        if first:
            print(f"start: {len(started)} of {len(trained)} arrays of {config.start_run}")
        found |= started
    new = shapes.keys() - found.keys()  # of a network with weights, only what those lack: the view embedding

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {name: leaf for name, leaf in named_leaves(vam.init(key)).items() if name in new}

    found |= jax.jit(init, out_shardings={name: where[name] for name in new})(key)
    return jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in shapes])


def open_windows(config: ExperimentConfig, split: str, run: epath.Path) -> Datasets:
    """What training reads of a split: frames, or the latents in their place that fit the tokenizer it uses."""
    datasets = open_datasets(config, split)
    if not config.data.latents:
        return datasets
    started = checkpoints.is_complete(run / "frozen")  # then the run goes on with what it kept, whatever has become of the other
    tokenizer = checkpoints.load_tokenizer(run if started else run_path(config.backbone_run), config)
    return datasets._replace(windows=with_latents(datasets.windows, config, split, tokenizer))


def with_views_of(config: ExperimentConfig, trained: ExperimentConfig) -> ExperimentConfig:
    """The configuration of a backbone of one view, extended to those of `config`; other backbones' as it is."""
    if trained.data.views > 1:
        return trained
    return dataclasses.replace(trained, data=dataclasses.replace(trained.data, cameras=config.data.cameras))


def find_embodiments(run: epath.Path, config: ExperimentConfig, datasets: Windows) -> dict[str, Embodiment]:
    """The robots of a run with the statistics it was trained with, or before its first checkpoint with those of its datasets.

    Several hosts compute them together; all have to call this.
    """
    hosts = Hosts(jax.process_index(), jax.process_count(), multihost_utils.process_allgather)
    if not hosts.gather(np.array(checkpoints.has_checkpoint(run))).all():  # asked together: none goes ahead and writes one
        directory.save_embodiments(
            run,
            {
                name: Embodiment(
                    name, index, cached_statistics(windows.episodes, config.data, hosts), windows.raw_dims, windows.cameras
                )
                for index, (name, windows) in enumerate(datasets.items())
            },
        )
        multihost_utils.sync_global_devices("embodiments")
    return directory.load_embodiments(run)


def profiled_steps() -> tuple[int, int] | None:
    """The first and the last step to trace. Raises ConfigError if --profile is not two numbers."""
    if not _PROFILE.value:
        return None
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--profile is {_PROFILE.value!r}; expected FIRST:LAST, two steps such as 100:110")
    return int(first), int(last)


def main(config: ExperimentConfig) -> None:
    run, profile = run_path(_WORKDIR.value), profiled_steps()
    if config.train.wandb_project:
        wandb_package()
    if config.tokenizer.kind == "wan" and not config.backbone_run:
        raise ConfigError("config field 'backbone_run' is empty; expected a run with the weights of the Wan tokenizer")
    if config.backbone_run and not checkpoints.has_checkpoint(run):
        backbone = run_path(config.backbone_run)
        trained = with_views_of(config, directory.read_config(backbone))
        directory.require_same_model(trained, config, backbone, "window", "tokenizer", "backbone")
        checkpoints.require_checkpoint(backbone)
    with directory.locked(run):
        try:
            train_in(run, config, profile)
        except PreemptedError as stop:
            if jax.process_index() == 0:
                print(stop)
            sys.exit(EXIT_CODE)


def train_in(run: epath.Path, config: ExperimentConfig, profile: tuple[int, int] | None) -> None:
    """Opens the data, and trains in a directory that is this run's alone."""
    rows = batch_rows(config.train.batch_size, make_mesh(config.mesh))
    datasets, phases = open_windows(config, config.data.train_split, run)
    if config.decoder.embodiments and config.stage == "action" and len(datasets) != config.decoder.embodiments:
        raise ConfigError(
            f"config field 'decoder.embodiments' is {config.decoder.embodiments}; expected {len(datasets)}, the "
            "number of datasets"
        )
    encode_text = make_text_encoder(config.text, config.backbone.text_width)
    for instruction in {episode.instruction for windows in datasets.values() for episode in windows.episodes}:
        encode_text(instruction)  # so that one that does not fit is an error now
    directory.write_config(run, config)
    normalizers: dict[str, dict[str, Normalizer]] = {}
    if config.stage == "action":
        normalizers = {name: e.normalizers(config) for name, e in find_embodiments(run, config, datasets).items()}

    def mixed(datasets: Windows, seed: int) -> tuple[list[Part], Mixture]:
        parts = [Part(name, windows, normalizers.get(name)) for name, windows in datasets.items()]
        return parts, Mixture([len(windows) for windows in datasets.values()], phases, config.train.batch_size, seed)

    def batches(parts: list[Part], mixture: Mixture, start_step: int, scales: bool = False):
        return make_batches(
            parts,
            mixture,
            batch_size=config.train.batch_size,
            start_step=start_step,
            text=encode_text,
            decoder=config.decoder,
            rows=rows,
            workers=config.data.workers,
            skip_broken=config.data.skip_broken,
            scales=scales,
        )

    validation = []
    if config.train.validate_every:
        parts = mixed(open_windows(config, config.data.validation_split, run).windows, 0)
        stream = batches(*parts, 0, scales=config.train.validation_curves)
        validation = [next(stream) for _ in range(config.train.validation_batches)]
    data = mixed(datasets, config.seed)
    train(
        config,
        run,
        lambda mesh: initial_params(config, datasets, mesh),
        lambda step: batches(*data, step),
        lambda step: data_state(*data, step),
        validation,
        profile,
    )


if __name__ == "__main__":
    experiment.run(main, (DatasetError, NonFiniteLossError, RunError), inside=processes)
