"""Checkpoints and frozen parameters of run directories, whose layout is in runs/directory.py."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment
from mimic_video.parallel.distributed import agree, wait_for_all
from mimic_video.parallel.sharding import shardings
from mimic_video.runs.arrays import DamagedError, load_tree, nearest, tree_args, tree_handler
from mimic_video.runs.directory import read_config, require_empty, save_embodiments, write_config
from mimic_video.runs.fingerprints import json_fingerprint
from mimic_video.runs.storage import RunError, absolute, in_bucket
from mimic_video.stages import join_params, split_params
from mimic_video.trees import flat, named_leaves
from mimic_video.vam import Params, VideoActionModel

State = TypeVar("State", bound=Any)  # a dataclass of trees, with `step`, `params` and `ema` (training/steps.py)
Precision = Literal["configured", "stored", "float32", "bfloat16"]
START_PRECISION: dict[str, Precision] = {"video": "float32", "action": "configured"}  # in which a stage takes over `backbone_run`


class _Manager(ocp.CheckpointManager):
    saving: int | None = None  # the step that was last given to `save`

    def reached_preemption(self, step: int) -> bool:
        """Never: the training loop asks JAX after every step; asked again by a save's thread, about an older step, it would
        forget where this process is."""
        return False


@contextlib.contextmanager
def open_checkpoints(run: epath.Path, keep: int, keep_every: int = 0) -> Iterator[_Manager]:
    """The manager of a run's checkpoints. Saves are asynchronous and appear under their step only when complete.

    Args:
        keep: how many of the newest are kept.
        keep_every: those of its multiples are kept for good; 0 for none.

    Raises:
        RunError: if the last save could not be completed.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None, lightweight_initialize=True)
    folder = absolute(run / "checkpoints")
    _remove_unfinished(folder)
    manager = _Manager(folder, options=options)
    try:
        yield manager
    finally:
        with _saving(manager):
            manager.close()


def _remove_unfinished(folder: epath.Path) -> None:
    """Removes what a killed start was writing. All processes have to call this.

    The manager would do so while it, and other processes, list the folder, which in a bucket vanishes with its last object.
    """
    wait_for_all("about to remove unfinished checkpoints")
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if ocp.utils.is_tmp_checkpoint(path):
                path.rmtree()
    wait_for_all("removed unfinished checkpoints")


@contextlib.contextmanager
def _saving(manager: _Manager) -> Iterator[None]:
    """Turns what a failing save raises, then or later, into a RunError."""
    try:
        yield
    except Exception as error:
        good = _complete(manager.directory)
        left = f"the last good checkpoint is that of step {good[-1].name}" if good else "there is no earlier one"
        raise RunError(
            f"step {manager.saving} could not be saved in {manager.directory}: {' '.join(str(error).split())[:1000]}; "
            f"{left}, from where the same command continues"
        ) from error


def save(manager: _Manager, state: Any, data: Mapping[str, Any]) -> None:
    """Starts to save the state after its step, and for `require_same_data` that of the data, as JSON has it.

    Raises:
        RunError: if this save or the one before fails: on a full disk, for example.
    """
    args = {name: tree_args(item) for name, item in _items(state).items()}
    data = {"data": dict(data), "fingerprint": json_fingerprint(dict(data))}
    with _saving(manager):
        manager.wait_until_finished()  # so that an error is known to be the one before's
        manager.saving = int(state.step)
        manager.save(manager.saving, args=ocp.args.Composite(**args, data=ocp.args.JsonSave(data)))


def check_saves(manager: _Manager) -> None:
    """Raises RunError if a save that was started has failed; does not wait for it."""
    with _saving(manager):
        manager.check_for_errors()


def _items(state: Any) -> dict[str, Any]:
    """The state as what is stored apart: what inference reads, and the rest."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    items = {"params": rest.pop("params"), "ema": rest.pop("ema"), "train_state": rest}
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def restore(manager: ocp.CheckpointManager, state: State) -> State | None:
    """The newest checkpoint, straight into the shardings of `state` (arrays, or `abstract_state`); None if there is none.

    One that is damaged is moved aside with an error in the log, and the one before it is used.

    Raises:
        RunError: if the checkpoint holds converted weights, which training cannot continue from, or another model's; or if all
            checkpoints are damaged. Then nothing is moved.
    """
    run, damaged, restored = manager.directory.parent, {}, None
    for step in sorted(manager.all_steps(), reverse=True):
        path = manager.directory / str(step)
        if not any((path / item).exists() for item in ("train_state", "data")):
            raise RunError(
                f"{run} holds converted weights without optimizer state, so training cannot continue in it; "
                f"start from them with --config.backbone_run={run} and another --workdir"
            )
        try:
            items = {name: load_tree(path / name, item) for name, item in _items(state).items()}
            read_data(path)
        except DamagedError as error:
            damaged[step] = str(error)  # without the traceback, which would keep what was read in memory
            continue
        restored = dataclasses.replace(state, **{"ema": {}} | items.pop("train_state") | items)
        break
    if damaged and restored is None:
        raise RunError(f"no checkpoint of {run} can be used, and nothing was changed: " + "; ".join(damaged.values()))
    for old, problem in damaged.items():
        logging.error(
            "%s. It is moved to %s, and training continues from step %d", problem, _set_aside(manager.directory / str(old)), step
        )
    manager.reload()
    return restored


def _set_aside(path: epath.Path) -> epath.Path:
    """Renames checkpoints/N to checkpoints/N.damaged, or N.damaged.2 and so on; process 0 does it for all."""
    aside, count = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        aside, count = path.with_name(f"{path.name}.damaged.{count + 1}"), count + 1
    problem = agree(None)  # on the name
    if jax.process_index() == 0:
        try:
            path.rename(aside)
        except OSError as error:
            problem = f"{path} is damaged, and cannot be moved aside: {error}"
    problem = agree(problem)
    if problem is not None:
        raise RunError(problem)
    return aside


def read_data(checkpoint: epath.Path) -> dict[str, Any] | None:
    """The data that was given to `save`; None for a checkpoint from before there was that.

    All processes have to call this.

    Raises:
        DamagedError: if it cannot be read, or is not what was written.
    """
    path, problem, stored = checkpoint / "data", None, None
    if path.exists():
        try:
            stored = ocp.JsonCheckpointHandler().restore(absolute(path))
            if "fingerprint" in stored and json_fingerprint(stored["data"]) != stored["fingerprint"]:
                problem = "its fingerprint is not that of what was written"
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            problem = f"{type(error).__name__}: {error}"
    problem = agree(problem)
    if problem is not None:
        raise DamagedError(f"{path} is damaged: {problem}")
    return stored["data"] if stored and "fingerprint" in stored else stored


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
    run, stored = manager.directory.parent, read_data(manager.directory / str(step))
    if stored is None:
        logging.warning("%s does not say what data it was trained on; it continues with the data there are", run)
        return
    before, now = flat(stored), flat(dict(data(step)))
    changed = [f"{name}: {before.get(name)!r} → {now.get(name)!r}" for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise RunError(
            f"the data are not those that {run} was trained on ({'; '.join(changed)}), so samples would come in "
            "another order; bring the data back, or use another --workdir"
        )


def require_checkpoint(run: epath.Path) -> None:
    """Raises RunError unless the run has a complete checkpoint."""
    _newest_checkpoint(run)


def has_checkpoint(run: epath.Path) -> bool:
    """Whether the run has a complete checkpoint, so that it goes on from there with what it kept."""
    return bool(_complete(run / "checkpoints"))


def _complete(folder: epath.Path) -> list[epath.Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = [path for path in paths if path.name.isdigit() and is_complete(path)]
    return sorted(steps, key=lambda path: int(path.name))


def is_complete(item: epath.Path) -> bool:
    """Whether there is all that orbax had to write; in a bucket its last file says so, elsewhere the name."""
    return bool(ocp.utils.is_checkpoint_finalized(item))


def _newest_checkpoint(run: epath.Path) -> epath.Path:
    complete = _complete(epath.Path(run) / "checkpoints")
    if not complete:
        raise RunError(f"{run} has no complete checkpoint")
    return complete[-1]


def save_frozen(run: epath.Path, frozen: Params) -> None:
    """Keeps the parameters that a stage does not train, before its first checkpoint; in place of what an earlier start kept."""
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        checkpointer.save(absolute(run / "frozen"), args=tree_args(frozen), force=True)


def save_converted(
    run: epath.Path, config: ExperimentConfig, params: Params, embodiments: Mapping[str, Embodiment] | None = None
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
    run = epath.Path(run)
    require_empty(run)
    if (embodiments is None) == (config.stage == "action"):
        raise ValueError(f"embodiments are {'missing' if embodiments is None else 'given'} for stage '{config.stage}'")
    # Orbax copies NumPy arrays before it writes them, but not JAX arrays; and those alias aligned NumPy arrays on CPU.
    trained, frozen = split_params(jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=True), params), config)
    run.mkdir(parents=True, exist_ok=True)
    save_frozen(run, frozen)
    with ocp.CheckpointManager(absolute(run / "checkpoints"), item_handlers={"params": tree_handler()}) as manager:
        manager.save(0, args=ocp.args.Composite(params=tree_args(trained)))
    if embodiments is not None:
        save_embodiments(run, embodiments)
    write_config(run, config)  # the last, so that what an interruption leaves is not a run


def load_frozen(run: epath.Path, precision: Precision = "configured", mesh: Mesh | None = None) -> Params:
    """What `save_frozen` kept; arguments as for `load_params`. Raises RunError before it has, or if it is damaged."""
    path, config = _frozen_path(run), read_config(run)
    return load_tree(path, _abstract_params(config, precision, mesh)[1], stored_dtype=precision == "stored")


def load_tokenizer(run: epath.Path, config: ExperimentConfig) -> Params:
    """The tokenizer's parameters as NumPy arrays, as the experiment `config` computes with them.

    Args:
        run: the experiment's own run or, before that has started, its `backbone_run`. Nothing else of it is read.

    Raises:
        RunError: if there are no parameters, or they are damaged.
    """
    path = _frozen_path(run)
    target = {"tokenizer": _abstract_params(read_config(run), START_PRECISION[config.stage])[1]["tokenizer"]}
    dtype = VideoActionModel(config).dtype("tokenizer")
    return jax.tree.map(lambda leaf: np.asarray(leaf.astype(dtype)), load_tree(path, target)["tokenizer"])


def load_params(run: epath.Path, precision: Precision = "configured", mesh: Mesh | None = None) -> tuple[Params, int]:
    """Parameters of a run for inference (the moving average where there is one), and the step they are from.

    Args:
        precision: "configured" for what `config.precision` computes in, "stored" for what is on disk, or a dtype.
        mesh: they come straight into their shardings on it; None for one device.

    Raises:
        RunError: if the run has no complete checkpoint, or the newest is damaged. Nothing is moved.
    """
    config, frozen = read_config(run), load_frozen(run, precision, mesh)
    checkpoint = _newest_checkpoint(run)
    average, target = checkpoint / "ema", _abstract_params(config, precision, mesh)[0]
    try:
        trained = load_tree(average if average.exists() else checkpoint / "params", target, stored_dtype=precision == "stored")
    except DamagedError as error:
        raise RunError(_damage_advice(checkpoint, error)) from error
    return join_params(trained, frozen, config), int(checkpoint.name)


def load_start(
    run: epath.Path, start_map: tuple[tuple[str, str], ...], target: Mapping[str, Any], mesh: Mesh
) -> dict[str, jax.Array]:
    """Parameters of another run to start from, as `load_params` has them.

    Args:
        start_map: pairs (pattern, replacement) as `ExperimentConfig.start_map` describes.
        target: {path here, such as 'decoder/blocks/mlp/up/kernel': array or ShapeDtypeStruct with its sharding}, of all that
            could start so.

    Returns:
        The same dict without what an empty replacement leaves as it starts; in those shardings and dtypes.

    Raises:
        ConfigError: if a pattern is no regular expression, or matches none of the paths.
        RunError: if the run is not complete or damaged; if a path is not there, naming the nearest, or used twice; or a shape
            differs.
    """
    sources = _mapped(start_map, list(target))
    there = named_leaves(load_params(run, "stored", mesh)[0])
    misfits = [
        f"{name}: there is no {source} in {run}{nearest(source, there)}"
        for name, source in sources.items()
        if source not in there
    ]
    misfits += [
        f"{name} has shape {target[name].shape}, {source} there {there[source].shape}"
        for name, source in sources.items()
        if source in there and there[source].shape != target[name].shape
    ]
    misfits += [f"{source} is used more than once" for source, times in Counter(sources.values()).items() if times > 1]
    if misfits:
        raise RunError(f"config field 'start_map' does not fit {run}: " + "; ".join(misfits))
    return {
        name: jax.device_put(there.pop(source).astype(target[name].dtype), target[name].sharding)
        for name, source in sources.items()
    }


def _mapped(start_map: tuple[tuple[str, str], ...], names: list[str]) -> dict[str, str]:
    """{path here: path in the other run}; the first pair that matches counts, and an empty replacement leaves the path out."""
    sources, unused = {}, {pattern for pattern, _ in start_map}
    try:
        for name in names:
            pattern, replacement = next((pair for pair in start_map if re.search(pair[0], name)), ("", None))
            unused.discard(pattern)
            if replacement is None:
                sources[name] = name
            elif replacement:
                sources[name] = re.sub(pattern, replacement, name, count=1)
    except re.error as error:
        raise ConfigError(f"config field 'start_map' is {start_map!r}; expected regular expressions: {error}") from error
    if unused:
        raise ConfigError(
            f"config field 'start_map' has patterns {sorted(unused)} that no parameter is the first to match; "
            f"parameters are such as {names[0]!r}"
        )
    return sources


def _damage_advice(checkpoint: epath.Path, error: DamagedError) -> str:
    earlier = [path.name for path in _complete(checkpoint.parent) if path != checkpoint]
    if not earlier:
        return f"{error}; there is no earlier checkpoint"
    move = "gcloud storage mv" if in_bucket(checkpoint) else "mv"
    return f"{error}; to use that of step {earlier[-1]} instead: {move} {checkpoint} {checkpoint}.damaged"


def _frozen_path(run: epath.Path) -> epath.Path:
    path = epath.Path(run) / "frozen"
    if not is_complete(path):
        raise RunError(f"{run} has no {path.name} parameters: its training has not started")
    return path


def _abstract_params(config: ExperimentConfig, precision: Precision, mesh: Mesh | None = None) -> tuple[Params, Params]:
    """Shapes of the (trained, frozen) parameters, in their shardings on a mesh or on the first device, wherever they were
    trained."""
    vam = VideoActionModel(config)
    shapes = jax.eval_shape(lambda params: split_params(params, config), vam.shapes)
    one_device = SingleDeviceSharding(jax.local_devices()[0])

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        network = path[0].key
        if network == "lora" or precision == "stored":  # adapters are merged in float32
            return leaf.update(sharding=where)
        return leaf.update(dtype=vam.dtype(network) if precision == "configured" else precision, sharding=where)

    return tuple(
        jax.tree_util.tree_map_with_path(one, tree, shardings(tree, mesh) if mesh else jax.tree.map(lambda _: one_device, tree))
        for tree in shapes
    )
