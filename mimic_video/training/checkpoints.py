"""Run directories: what a training run leaves on disk, and how it is read back.

    run/config.json        the resolved configuration
    run/embodiments.json   the robots and their normalisation statistics (stage `action`)
    run/frozen/            parameters that the stage reads but does not train
    run/checkpoints/N/     orbax items after N steps: params, train_state, data (JSON: where the batches stand and what they are
                           drawn from), and ema when it is on; of converted weights, params
    run/metrics.jsonl, run/tensorboard/
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mimic_video.config import ConfigError, ExperimentConfig, experiment_from, to_dict
from mimic_video.embodiments import Embodiment, from_table, to_table
from mimic_video.training.sharding import path_name
from mimic_video.training.steps import TrainState, join_params, split_params
from mimic_video.vam import Params, VideoActionModel

Precision = Literal["configured", "stored", "float32", "bfloat16"]
START_PRECISION: dict[str, Precision] = {"video": "float32", "action": "configured"}  # in which a stage takes over `backbone_run`

_MAY_CHANGE = ("train.log_every", "train.validate_every", "train.checkpoint_every", "train.keep_checkpoints", "text.model",
               "text.cache", "tokenizer.chunk_latents", "mesh.", "policy.", "evaluation.")  # fmt: skip
# What the weights of a tokenizer and backbone depend on.
MODEL_FIELDS = ("data.cameras", "tokenizer.kind", "tokenizer.width", "text.kind", "text.rows", "text.width", "backbone")


class RunError(RuntimeError):
    """A run directory that is missing something, or belongs to another experiment."""


def write_config(run: pathlib.Path, config: ExperimentConfig) -> None:
    """Records the configuration, of several hosts the first one; on resume, insists that it is the one the run was started with.

    Raises:
        ConfigError: listing every field that changed and may not.
    """
    path = run / "config.json"
    if path.exists():
        before, now = _flat(to_dict(read_config(run))), _flat(to_dict(config))
        changed = [f"{name}: {before[name]!r} → {now[name]!r}" for name in now
                   if before[name] != now[name] and not name.startswith(_MAY_CHANGE)]  # fmt: skip
        if changed:
            raise ConfigError(f"{run} holds a run with another configuration ({'; '.join(changed)}); use another --workdir")
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(config))


def read_config(run: pathlib.Path) -> ExperimentConfig:
    """The configuration of a run. Raises RunError if there is no run."""
    path = pathlib.Path(run) / "config.json"
    if not path.exists():
        raise RunError(f"{run} is not a run directory: it has no config.json")
    return experiment_from(json.loads(path.read_text()))


def require_same_model(trained: ExperimentConfig, wanted: ExperimentConfig, fields: tuple[str, ...], run: pathlib.Path) -> None:
    """Checks that two experiments agree on what weights depend on.

    Raises:
        ConfigError: listing every field under `fields` whose value is not the one that `run` was trained with.
    """
    before, now = _flat(to_dict(trained)), _flat(to_dict(wanted))
    changed = [f"'{name}' is {now[name]!r}, there {before[name]!r}" for name in now
               if f"{name}.".startswith(tuple(f"{field}." for field in fields)) and before[name] != now[name]]  # fmt: skip
    if changed:
        raise ConfigError(f"the weights of {run} do not fit this configuration: config field " + "; ".join(changed))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that the file is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2))
    os.replace(partial, path)


def require_checkpoint(run: pathlib.Path) -> None:
    """Raises RunError unless the run has a complete checkpoint."""
    _newest_checkpoint(run)


def _newest_checkpoint(run: pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(run) / "checkpoints"
    complete = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not complete:
        raise RunError(f"{run} has no complete checkpoint")
    return max(complete, key=lambda path: int(path.name))


def require_empty(run: pathlib.Path) -> None:
    """Raises RunError if there is anything in the directory."""
    if run.exists() and any(run.iterdir()):
        raise RunError(f"{run} is not empty; converted weights go to a directory of their own")


def open_checkpoints(run: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints. Saves are asynchronous and appear under their step only when complete."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, data: Mapping[str, Any]) -> None:
    """Saves the state after its step, and for `require_same_data` that of the data, as JSON has it."""
    items = {"params": state.params, "train_state": {"step": state.step, "opt_state": state.opt_state}}
    if state.ema:
        items["ema"] = state.ema
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    manager.save(int(state.step), args=ocp.args.Composite(**args, data=ocp.args.JsonSave(dict(data))))


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState | None:
    """The newest checkpoint, straight into the shardings of `state` (arrays, or `abstract_state`); None if there is none.

    Raises:
        RunError: if the checkpoint holds converted weights, which training cannot continue from.
    """
    step = manager.latest_step()
    if step is None:
        return None
    if not (manager.directory / str(step) / "train_state").exists():
        run = manager.directory.parent
        raise RunError(f"{run} holds converted weights without optimizer state, so training cannot continue in it; "
                       f"start from them with --config.backbone_run={run} and another --workdir")  # fmt: skip
    targets = {"params": state.params, "train_state": {"step": state.step, "opt_state": state.opt_state}}
    if state.ema:
        targets["ema"] = state.ema
    restored = manager.restore(
        step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(_abstract(item)) for name, item in targets.items()})
    )
    return TrainState(params=restored["params"], ema=restored["ema"] if state.ema else {}, **restored["train_state"])


def require_same_data(manager: ocp.CheckpointManager, data: Callable[[int], Mapping[str, Any]]) -> None:
    """Checks that the newest checkpoint's batches were drawn from the data that there is now, if there is a checkpoint.

    A checkpoint from before there was the item `data` passes, with a warning.

    Args:
        data: step → what was given to `save` after it.

    Raises:
        RunError: naming each value that differs, and with it its dataset. Samples would silently come in another order.
    """
    step = manager.latest_step()
    if step is None:
        return
    run = manager.directory.parent
    if not (manager.directory / str(step) / "data").exists():
        logging.warning("%s does not say what data it was trained on; it continues with the data there are", run)
        return
    before = _flat(manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"])
    now = _flat(dict(data(step)))
    changed = [f"{name}: {before.get(name)!r} → {now.get(name)!r}" for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise RunError(f"the data are not those that {run} was trained on ({'; '.join(changed)}), so samples would come in "
                       "another order; bring the data back, or use another --workdir")  # fmt: skip


def save_frozen(run: pathlib.Path, frozen: Params) -> None:
    """Keeps the parameters that a stage does not train, once per run."""
    path = (run / "frozen").absolute()
    if not path.exists():
        with ocp.Checkpointer(_tree_handler()) as checkpointer:
            checkpointer.save(path, args=_save_args(frozen))


def save_converted(
    run: pathlib.Path, config: ExperimentConfig, params: Params, embodiments: Mapping[str, Embodiment] | None = None
) -> None:
    """Writes converted weights as a run directory that everything but the continuation of training reads.

    Args:
        run: absent or empty.
        params: NumPy or JAX arrays of every network that `config.stage` reads or trains; they are stored in their dtype.
        embodiments: given for stage `action`, and only there.

    Raises:
        RunError: if the directory holds something.
        ValueError: if `embodiments` do not go with the stage.
    """
    run = pathlib.Path(run)
    require_empty(run)
    if (embodiments is None) == (config.stage == "action"):
        raise ValueError(f"embodiments are {'missing' if embodiments is None else 'given'} for stage '{config.stage}'")
    # Orbax copies NumPy arrays before it writes them, but not JAX arrays; and those alias aligned NumPy arrays on CPU.
    trained, frozen = split_params(jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=True), params), config)
    run.mkdir(parents=True, exist_ok=True)
    save_frozen(run, frozen)
    with ocp.CheckpointManager((run / "checkpoints").absolute(), item_handlers={"params": _tree_handler()}) as manager:
        manager.save(0, args=ocp.args.Composite(params=_save_args(trained)))
    if embodiments is not None:
        save_embodiments(run, embodiments)
    write_config(run, config)  # the last, so that what an interruption leaves is not a run


def save_embodiments(run: pathlib.Path, embodiments: Mapping[str, Embodiment]) -> None:
    """Writes the robots of a run of stage `action`; of several hosts the first one does."""
    if jax.process_index() == 0:
        write_json(run / "embodiments.json", to_table(embodiments))


def load_embodiments(run: pathlib.Path) -> dict[str, Embodiment]:
    """The robots of a run of stage `action`, by name. Raises RunError if it has none, or their file is damaged."""
    path = pathlib.Path(run) / "embodiments.json"
    if not path.exists():
        raise RunError(f"{run} has no {path.name}: its training has not started, or it is not of stage 'action'")
    try:
        return from_table(json.loads(path.read_text()))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def load_frozen(run: pathlib.Path, precision: Precision = "configured") -> Params:
    """What `save_frozen` kept, on one device; `precision` as for `load_params`. Raises RunError before it has."""
    path, config = _frozen_path(run), read_config(run)
    return _load_tree(path, split_params(_abstract_params(config, precision), config)[1], precision)


def load_tokenizer(run: pathlib.Path, config: ExperimentConfig) -> Params:
    """The tokenizer's parameters as NumPy arrays, as the experiment `config` computes with them.

    Args:
        run: the experiment's own run or, before that has started, its `backbone_run`. Nothing else of it is read.

    Raises:
        RunError: if there are no parameters.
    """
    path = _frozen_path(run)
    target = {"tokenizer": _abstract_params(read_config(run), START_PRECISION[config.stage])["tokenizer"]}
    arguments = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tokenizer = checkpointer.restore(path.absolute(), args=arguments)["tokenizer"]
    dtype = VideoActionModel(config).dtype("tokenizer")
    return jax.tree.map(lambda leaf: np.asarray(leaf.astype(dtype)), tokenizer)


def load_params(run: pathlib.Path, precision: Precision = "configured") -> tuple[Params, int]:
    """Parameters of a run for inference (the moving average where there is one), on one device; and the step they are from.

    Args:
        precision: "configured" for what `config.precision` computes in, "stored" for what is on disk, or a dtype.

    Raises:
        RunError: if the run has no complete checkpoint.
    """
    config, frozen = read_config(run), load_frozen(run, precision)
    checkpoint = _newest_checkpoint(run)
    average = checkpoint / "ema"
    target = split_params(_abstract_params(config, precision), config)[0]
    trained = _load_tree(average if average.exists() else checkpoint / "params", target, precision)
    return join_params(trained, frozen, config), int(checkpoint.name)


def _frozen_path(run: pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(run) / "frozen"
    if not path.exists():
        raise RunError(f"{run} has no {path.name} parameters: its training has not started")
    return path


def _load_tree(path: pathlib.Path, target: Params, precision: Precision) -> Params:
    with ocp.Checkpointer(_tree_handler()) as checkpointer:
        if precision == "stored":
            stored = _flat(_tree_handler().metadata(path.absolute()).tree)
            target = jax.tree_util.tree_map_with_path(
                lambda key, leaf: leaf.update(dtype=stored[path_name(key).replace("/", ".")].dtype), target
            )
        return checkpointer.restore(path.absolute(), args=ocp.args.StandardRestore(target))


def _tree_handler() -> ocp.StandardCheckpointHandler:
    """For trees of billions of parameters: by default, copies of all of them are in memory before the first is written."""
    return ocp.StandardCheckpointHandler(save_concurrent_gb=1, restore_concurrent_gb=1)


def _save_args(tree: Params) -> ocp.args.StandardSave:
    """Pieces of 64 MiB, each compressed, written and let go by itself."""
    return ocp.args.StandardSave(tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=64 * 2**20), tree))


def _abstract_params(config: ExperimentConfig, precision: Precision) -> Params:
    """Shapes of all parameters, on the first device whatever mesh they were trained on."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    vam = VideoActionModel(config)
    shapes = jax.eval_shape(vam.init, jax.random.key(0))

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = {"configured": vam.dtype(path[0].key), "stored": leaf.dtype}.get(precision, precision)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def _flat(values: dict) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda value: not isinstance(value, dict))
    return {path_name(path).replace("/", "."): leaf for path, leaf in leaves}
