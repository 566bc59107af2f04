"""Run directories: what a training run leaves on disk. Here what is small; runs/checkpoints.py has the arrays.

    run/config.json        the resolved configuration
    run/embodiments.json   the robots and their normalisation statistics (stage `action`)
    run/status.json        where its training and its evaluation stand: runs/status.py
    run/lock               who is training in it (JSON); empty when nobody is, or out of date after a kill
    run/evaluation.lock    the same of evaluation
    run/frozen/            parameters that the stage reads but does not train
    run/checkpoints/N/     orbax items after N steps: params, train_state, data (JSON: where the batches stand and what they are
                           drawn from), and ema when it is on; of converted weights, params
    run/checkpoints/N.damaged/  one that could not be read or is not what was written, kept to be looked at
    run/metrics.jsonl, run/tensorboard/, run/samples/, run/first_start, run/wandb_id, run/wandb/, run/profile/

Paths are those of runs/storage.py.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from mimic_video.atomic import atomically
from mimic_video.config import (
    ConfigError,
    ExperimentConfig,
    Shaped,
    describe,
    experiment_from,
    shaping,
    stored_experiment,
    to_dict,
    value_at,
)
from mimic_video.embodiments import Embodiment, from_table, to_table
from mimic_video.parallel.distributed import agree, of_process_0, wait_for_all
from mimic_video.runs.storage import RunError, absolute, in_bucket, is_leased, lease, read_whole
from mimic_video.trees import flat

# Fields that say where and how a host reads, and may be each host's own; that the data are the same is seen when they are open.
_OF_A_HOST = ("data.video_dataset", "data.action_dataset", "data.root", "data.frame_cache_mb", "data.workers", "text.cache")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def require_one_run(run: epath.Path, config: ExperimentConfig) -> None:
    """Checks that all processes were started for the same run, before any of them writes. All have to call this.

    Raises:
        ConfigError: in those that differ from process 0, naming the run directories or every field.
    """
    if jax.process_count() == 1:
        return
    own = {"run": str(absolute(run)), "config": to_dict(config)}
    first = json.loads(of_process_0("run", json.dumps(own)))
    there = experiment_from(first["config"])
    paths = [field.path for field in describe(ExperimentConfig) if field.path not in _OF_A_HOST]
    differing = [f"the run directory is {own['run']}, there {first['run']}"] if first["run"] != own["run"] else []
    differing += [
        f"config field '{path}' is {value_at(config, path)!r}, there {value_at(there, path)!r}"
        for path in _differences(there, config, paths)
    ]
    if differing:
        raise ConfigError(f"this process and process 0 were started for different runs: {'; '.join(differing)}")
    wait_for_all("run")


def require_one_data(state: Callable[[int], Mapping[str, Any]]) -> None:
    """Checks that all processes read the same data, wherever they have them. All have to call this.

    Args:
        state: that of `OpenData`.

    Raises:
        RunError: in those that differ from process 0, naming every value.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(state(0)))
    there, own = flat(json.loads(of_process_0("data", text))), flat(json.loads(text))
    differing = [
        f"{name}: {own.get(name)!r}, there {there.get(name)!r}" for name in there | own if there.get(name) != own.get(name)
    ]
    if differing:
        raise RunError(f"this process and process 0 read different data ({'; '.join(differing)})")
    wait_for_all("data")


def write_config(run: epath.Path, config: ExperimentConfig) -> None:
    """Records the configuration, of several hosts the first one; on resume, insists that the run may go on with it.

    Raises:
        ConfigError: listing every field that changed and may not.
    """
    require_resumable(run, config)
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", to_dict(config))


def require_resumable(run: epath.Path, config: ExperimentConfig) -> None:
    """Raises ConfigError, listing every field that changed and may not, if a run is there that cannot go on with this one."""
    if (run / "config.json").exists() and (changed := _forbidden_changes(run, read_config(run), config)):
        raise ConfigError(f"{run} holds a run with another configuration ({'; '.join(changed)}); use another --workdir")


def _forbidden_changes(run: epath.Path, before: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """What keeps a run from going on with another configuration, by field."""
    fixed = [field.path for field in describe(ExperimentConfig) if field.on_resume == "fixed"]
    changed = [path for path in _differences(before, now, fixed) if path != "train.schedule_steps"]
    messages = [f"{path}: {value_at(before, path)!r} → {value_at(now, path)!r}" for path in changed]
    # However it is written, what counts is where the schedule ends; `train.steps` is free of it if that is said by itself.
    if (end := before.train.schedule_end) != now.train.schedule_end and before.train.schedule == now.train.schedule:
        messages.append(
            f"train.schedule_steps: {before.train.schedule_steps} → {now.train.schedule_steps}, with train.steps: "
            f"{before.train.steps} → {now.train.steps}; a schedule that is {now.train.schedule!r} and ends at step {end} needs "
            f"train.schedule_steps={end} for that"
        )
    done = _steps_done(run)
    if now.train.steps < done:
        messages.append(f"train.steps: {before.train.steps} → {now.train.steps}, of which {done} are done")
    return messages


def _steps_done(run: epath.Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    folder = run / "checkpoints"
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) if folder.is_dir() else 0


def _differences(one: ExperimentConfig, other: ExperimentConfig, paths: Iterable[str]) -> list[str]:
    """Those of the fields in which two configurations differ."""
    return [path for path in paths if value_at(one, path) != value_at(other, path)]


def read_config(run: epath.Path) -> ExperimentConfig:
    """The configuration of a run or a bundle, which an earlier version may have written.

    Raises:
        RunError: if there is no run, or its configuration is damaged.
        ConfigError: naming the field, if it cannot be read by this version.
    """
    path = epath.Path(run) / "config.json"
    if not path.exists():
        raise RunError(f"{run} is not a run directory: it has no config.json")
    try:
        return stored_experiment(json.loads(read_whole(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); put back a copy, or remove it if the experiment is the same") from error


def read_policy_config(run: epath.Path) -> ExperimentConfig:
    """`read_config`; raises RunError also if the run is not of the stage that a policy comes from."""
    config = read_config(run)
    if config.stage != "action":
        raise RunError(f"{run} holds a run of stage '{config.stage}'; a policy needs stage 'action'")
    return config


def require_same_model(trained: ExperimentConfig, wanted: ExperimentConfig, run: epath.Path, *shaped: Shaped) -> None:
    """Checks that two experiments agree on what weights depend on.

    Args:
        run: where `trained` is from, for the message.
        shaped: the networks that are taken over, and "window" if they have to have been trained on the same windows.

    Raises:
        ConfigError: listing every field that one of `shaped` presupposes and whose value is not the one it was trained with.
    """
    changed = [
        f"'{path}' is {value_at(wanted, path)!r}, there {value_at(trained, path)!r}"
        for path in _differences(trained, wanted, shaping(*shaped))
    ]
    if changed:
        raise ConfigError(f"the weights of {run} do not fit this configuration: config field " + "; ".join(changed))


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that the file is whole or absent."""
    # An object in a bucket is never there in part.
    with contextlib.nullcontext(path) if in_bucket(path) else atomically(path) as partial:
        partial.write_text(json.dumps(value, indent=2))


def require_empty(run: epath.Path) -> None:
    """Raises RunError if there is anything in the directory."""
    if run.exists() and any(run.iterdir()):
        raise RunError(f"{run} is not empty; converted weights go to a directory of their own")


def save_embodiments(run: epath.Path, embodiments: Mapping[str, Embodiment]) -> None:
    """Writes the robots of a run of stage `action`; of several hosts the first one does."""
    if jax.process_index() == 0:
        write_json(run / "embodiments.json", to_table(embodiments))


def load_embodiments(run: epath.Path) -> dict[str, Embodiment]:
    """The robots of a run of stage `action`, by name. Raises RunError if it has none, or their file is damaged."""
    path = epath.Path(run) / "embodiments.json"
    if not path.exists():
        raise RunError(f"{run} has no {path.name}: its training has not started, or it is not of stage 'action'")
    try:
        return from_table(json.loads(read_whole(path)))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def read_metrics(run: epath.Path) -> list[dict[str, float]]:
    """Every complete record of a run, oldest first.

    A last line that a kill cut short is left out, and so are, with a warning, lines that are no records: after a power cut there
    may be zeros in their place.
    """
    path = epath.Path(run) / "metrics.jsonl"
    lines = read_whole(path).split(b"\n")[:-1] if path.exists() else []
    records = [record for line in lines if (record := _record(line))]
    if len(records) < len(lines):
        logging.warning("%s: %d of %d lines are no records and are left out", path, len(lines) - len(records), len(lines))
    return records


def _record(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


@contextlib.contextmanager
def locked(run: epath.Path, name: str = "lock") -> Iterator[None]:
    """Keeps other runs out of a run directory until the block ends, and makes the directory if it is not there.

    The lock is the kernel's (flock) on the file `name` of it, held by process 0, so a killed run leaves none. On NFS it works
    across machines (Linux passes it on to the server). Some network file systems keep it to one machine (Lustre mounted with
    `localflock`, buckets through FUSE), where two machines can still run into each other; those without any get a warning. In a
    bucket it is a lease: after a kill, the next start waits until that is known to be over.

    Raises:
        RunError: if another run holds the lock, naming its host and process, or if the directory cannot be written.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if jax.process_index() == 0:
            hold = lease if in_bucket(run) else _file_lock
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%F %T%z")}
            try:
                held.enter_context(hold(run / name, owner))
            except RunError as error:
                problem = str(error)
        problem = agree(problem)
        if problem is not None:
            raise RunError(problem)
        yield


@contextlib.contextmanager
def _file_lock(lock: epath.Path, owner: Mapping[str, Any]) -> Iterator[None]:
    """What `lease` is in a bucket."""
    run = lock.parent
    with contextlib.ExitStack() as opened:
        try:
            run.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(open(lock, "a+"))
            _flock(run, file)
            file.truncate(0)
            json.dump(owner, file)
            file.flush()
        except OSError as error:
            raise RunError(f"{run} cannot be written: {error}") from error
        opened.callback(file.truncate, 0)
        yield


def _flock(run: epath.Path, file: Any) -> None:
    """Locks an open file. Raises RunError if another process has locked it."""
    try:
        _flock_soon(file)
    except BlockingIOError as refused:
        file.seek(0)
        try:
            owner = json.load(file)
        except ValueError:  # it has only just begun
            raise RunError(f"another run is using {run}; wait for it to end, or use another --workdir") from refused
        raise RunError(
            f"process {owner['pid']} on {owner['host']} has been training in {run} since {owner['started']}; "
            "stop it, or use another --workdir"
        ) from refused
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.warning("%s is on a file system without locks (%s): nothing keeps a second run out of it", run, error)


def _flock_soon(file: Any) -> None:
    """Locks a file for this process alone; `is_locked` may have it for a moment."""
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(run: epath.Path, name: str = "lock") -> bool:
    """Whether a process holds the lock `name` of a run; in a bucket, whether one has renewed it lately."""
    lock = epath.Path(run) / name
    if in_bucket(run):
        return is_leased(lock)
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return bool(lock.read_text())  # who holds it empties it
    return False
