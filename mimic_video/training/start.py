"""What a run starts from: networks of other runs, a tokenizer fitted to the data, random parameters; and its robots."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment
from mimic_video.parallel.distributed import gather, wait_for_all
from mimic_video.parallel.sharding import on_mesh, shardings
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import run_path
from mimic_video.stages import TRAINED
from mimic_video.trees import named_leaves
from mimic_video.vam import Params, VideoActionModel


def require_backbone(config: ExperimentConfig, run: epath.Path) -> None:
    """Checks the run that tokenizer and backbone come from; a run with a checkpoint has kept what it needs of it.

    Raises:
        ConfigError: if there has to be one and there is none, or it was trained with another configuration.
        RunError: if it is not a run, or has no checkpoint.
    """
    if config.tokenizer.network.pretrained and not config.backbone_run:
        raise ConfigError(
            f"config field 'backbone_run' is empty; expected a run with the weights of the tokenizer {config.tokenizer.kind!r}"
        )
    if config.backbone_run and not checkpoints.has_checkpoint(run):
        backbone = run_path(config.backbone_run)
        trained = _with_views_of(config, directory.read_config(backbone))
        directory.require_same_model(trained, config, backbone, "window", "tokenizer", "backbone")
        checkpoints.require_checkpoint(backbone)


def _with_views_of(config: ExperimentConfig, trained: ExperimentConfig) -> ExperimentConfig:
    """The configuration of a backbone of one view, extended to those of `config`; other backbones' as it is."""
    if trained.data.views > 1:
        return trained
    return dataclasses.replace(trained, data=dataclasses.replace(trained.data, cameras=config.data.cameras))


def read_tokenizer(config: ExperimentConfig, run: epath.Path) -> Params:
    """The tokenizer of an experiment with a `backbone_run`, as `load_tokenizer` has it.

    A run with a checkpoint goes on with what it kept, whatever has become of the other.
    """
    return checkpoints.load_tokenizer(run if checkpoints.has_checkpoint(run) else run_path(config.backbone_run), config)


def find_robots(run: epath.Path, compute: Callable[[], Mapping[str, Embodiment]]) -> dict[str, Embodiment]:
    """The robots of a run with the statistics it was trained with; before its first checkpoint those that `compute` gives.

    All processes have to call this.
    """
    there = np.array(checkpoints.has_checkpoint(run))
    if not gather(there).all():  # asked together: none goes ahead and writes one
        directory.save_embodiments(run, compute())
        wait_for_all("embodiments")
    return directory.load_embodiments(run)


def initial_params(config: ExperimentConfig, mesh: Mesh, samples: Callable[[int], Iterable[Mapping[str, np.ndarray]]]) -> Params:
    """Random networks on a mesh, but the tokenizer and backbone of a `backbone_run`, and what a `start_run` has.

    Args:
        samples: windows to fit the tokenizer to, as `OpenData.samples`: asked for if there is no `backbone_run`.
    """
    vam, key, first = VideoActionModel(config), jax.random.key(config.seed), jax.process_index() == 0
    shapes, where = named_leaves(vam.shapes), named_leaves(shardings(vam.shapes, mesh))
    if config.backbone_run:
        run = run_path(config.backbone_run)
        pretrained, step = checkpoints.load_params(run, checkpoints.START_PRECISION[config.stage], mesh)
        if first:
            print(f"backbone: step {step} of {run}")
        found = named_leaves({name: pretrained[name] for name in ("tokenizer", "backbone")})
    elif not hasattr(config.tokenizer.network, "fit"):
        found = {}
    else:
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), vam.shapes["tokenizer"])
        tokenizer = fit_tokenizer(config, samples(config.tokenizer.fit_windows)) if first else blank
        wait_for_all("tokenizer")  # while the first one fits it
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
    networks = {name.partition("/")[0] for name in new}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {name: leaf for name, leaf in named_leaves(vam.init(key, networks)).items() if name in new}

    found |= on_mesh(init, mesh, once=True, out_shardings={name: where[name] for name in new})(key)
    return jax.tree.unflatten(jax.tree.structure(vam.shapes), [found[name] for name in shapes])


def fit_tokenizer(config: ExperimentConfig, samples: Iterable[Mapping[str, np.ndarray]]) -> Params:
    """Parameters of a tokenizer fitted to windows, those of `OpenData.samples`; cameras that a window lacks are left out."""
    views = [view for sample in samples for view in itertools.compress(sample["video"], sample.get("view_mask", [True]))]
    video = np.stack(views).astype(np.float32) / 127.5 - 1
    tokenizer = config.tokenizer.network.build(config, nnx.Rngs(config.seed))
    unexplained = tokenizer.fit(video)
    shares = ", ".join(f"{share:.1%} of {what}" for share, what in zip(unexplained, ("first frames", "the others"), strict=False))
    print(f"tokenizer: unexplained variance {shares}")
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param)))
