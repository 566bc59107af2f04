"""Run directories: what a training run leaves on disk, and how it is read back.

    run/config.json        the resolved configuration
    run/statistics.json    normalisation statistics (stage `action`)
    run/frozen/            parameters that the stage reads but does not train
    run/checkpoints/N/     orbax items after N steps: params, train_state, and ema when it is on
    run/metrics.jsonl, run/tensorboard/
"""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from mimic_video.config import ConfigError, ExperimentConfig, experiment_from, to_dict
from mimic_video.training.sharding import path_name
from mimic_video.training.steps import TrainState, split_params
from mimic_video.vam import Params, VideoActionModel

_MAY_CHANGE = ("train.log_every", "train.validate_every", "train.checkpoint_every", "train.keep_checkpoints",
               "mesh.", "policy.", "evaluation.")  # fmt: skip


class RunError(RuntimeError):
    """A run directory that is missing something, or belongs to another experiment."""


def write_config(run: pathlib.Path, config: ExperimentConfig) -> None:
    """Records the configuration; on resume, insists that it is the one the run was started with.

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
    folder = pathlib.Path(run) / "checkpoints"
    if not folder.is_dir() or not any(path.name.isdigit() for path in folder.iterdir()):
        raise RunError(f"{run} has no complete checkpoint")


def open_checkpoints(run: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints. Saves are asynchronous and appear under their step only when complete."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Saves the state after its step."""
    items = {"params": state.params, "train_state": {"step": state.step, "opt_state": state.opt_state}}
    if state.ema:
        items["ema"] = state.ema
    manager.save(int(state.step), args=ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()}))


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState | None:
    """The newest checkpoint, straight into the shardings of `state` (arrays, or `abstract_state`); None if there is none."""
    step = manager.latest_step()
    if step is None:
        return None
    targets = {"params": state.params, "train_state": {"step": state.step, "opt_state": state.opt_state}}
    if state.ema:
        targets["ema"] = state.ema
    restored = manager.restore(
        step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(_abstract(item)) for name, item in targets.items()})
    )
    return TrainState(params=restored["params"], ema=restored["ema"] if state.ema else {}, **restored["train_state"])


def save_frozen(run: pathlib.Path, frozen: Params) -> None:
    """Keeps the parameters that a stage does not train, once per run."""
    path = (run / "frozen").absolute()
    if not path.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, frozen)


def load_frozen(run: pathlib.Path) -> Params:
    """What `save_frozen` kept, on one device. Raises RunError before it has."""
    path = (pathlib.Path(run) / "frozen").absolute()
    if not path.exists():
        raise RunError(f"{run} has no {path.name} parameters: its training has not started")
    config = read_config(run)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, split_params(_abstract_params(config), config.stage)[1])


def load_params(run: pathlib.Path) -> tuple[Params, int]:
    """Parameters of a run for inference (the moving average where there is one), on one device; and the step they are from.

    Raises:
        RunError: if the run has no complete checkpoint.
    """
    run = pathlib.Path(run)
    config, frozen = read_config(run), load_frozen(run)
    require_checkpoint(run)
    with open_checkpoints(run, config.train.keep_checkpoints) as manager:
        step = manager.latest_step()
        item = "ema" if config.train.keeps_average else "params"
        target = ocp.args.StandardRestore(split_params(_abstract_params(config), config.stage)[0])
        return frozen | manager.restore(step, args=ocp.args.Composite(**{item: target}))[item], step


def _abstract_params(config: ExperimentConfig) -> Params:
    """Shapes of all parameters, on the first device whatever mesh they were trained on."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(VideoActionModel(config).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def _flat(values: dict) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda value: not isinstance(value, dict))
    return {path_name(path).replace("/", "."): leaf for path, leaf in leaves}
