"""One training run from start, or from where it was interrupted, to its last step."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mimic_video.config import ExperimentConfig
from mimic_video.embodiments import Embodiment
from mimic_video.parallel.sharding import batch_rows, global_batch, make_mesh, place
from mimic_video.progress import progress
from mimic_video.runs import checkpoints
from mimic_video.runs.directory import locked, require_one_data, require_one_run, write_config
from mimic_video.runs.status import reported
from mimic_video.runs.storage import RunError, run_path
from mimic_video.stages import split_params
from mimic_video.training.clock import ProfilerWindow, StepClock, first_start
from mimic_video.training.data import Data, OpenData
from mimic_video.training.metrics import MetricWriter, device_memory, require_wandb
from mimic_video.training.preemption import PreemptedError, ended_by_sigterm, preemption_notices
from mimic_video.training.start import find_robots, initial_params, read_tokenizer, require_backbone
from mimic_video.training.steps import TrainState, abstract_state, initial_state, make_train_step
from mimic_video.training.validation import make_validation
from mimic_video.vam import Params, VideoActionModel


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient stopped being a number; the last checkpoint before that is kept."""


def train(config: ExperimentConfig, run: str | os.PathLike, data: Data, profile: tuple[int, int] | None = None) -> TrainState:
    """Trains `config.stage` in the directory `run`, resuming from its newest checkpoint if it has one.

    To be called by all processes of a run, in the main thread, which signals go to. Other runs are kept out of the directory
    meanwhile.

    Args:
        run: a directory or `gs://BUCKET/FOLDER`, which is made if it is not there.
        data: what the stage reads, such as `data_pipelines.assembly.TrainingData(config)`.
        profile: the first and the last step to trace.

    Returns:
        The final state; the run directory holds it too.

    Raises:
        ConfigError: if the directory holds a run with another configuration, the configuration does not fit its `backbone_run`,
            the machine or the data, or there are no such steps to trace; or if processes have different runs or configurations.
        RunError: if the directory is in use, holds a run that was trained on other data, or no checkpoint that can be read, or
            if it cannot be written; or if `backbone_run` or `start_run` cannot be read, or processes have different data.
        NonFiniteLossError: if the loss or its gradient becomes NaN or infinite.
        PreemptedError: if it was asked to stop before the last step, after it has saved.
        Exception: what is wrong with the data.
    """
    run = run_path(run)
    if config.train.wandb_project and jax.process_index() == 0:
        require_wandb(config.train.wandb_project)
    require_one_run(run, config)
    stops = (PreemptedError,)
    with locked(run), reported(run, "training", config.train.steps, stops) as report, ended_by_sigterm():
        require_backbone(config, run)
        mesh = make_mesh(config.mesh)
        opened = data.open(batch_rows(config.train.batch_size, mesh), lambda: read_tokenizer(config, run))
        require_one_data(opened.state)
        write_config(run, config)
        robots = find_robots(run, opened.robots) if config.stage == "action" else {}
        return _train_in(run, config, mesh, opened, robots, profile, report)


def _train_in(
    run: epath.Path,
    config: ExperimentConfig,
    mesh: Mesh,
    data: OpenData,
    robots: Mapping[str, Embodiment],
    profile: tuple[int, int] | None,
    report: Callable[[int], None],
) -> TrainState:
    """`train` in a directory that is this run's alone and has its configuration and robots."""
    validation = data.validation(robots)
    started, profiler = first_start(run), ProfilerWindow(run, profile, config.train.steps)
    vam, settings = VideoActionModel(config), config.train
    opened = checkpoints.open_checkpoints(run, settings.keep_checkpoints, settings.keep_every)
    with _full_disk_explained(run), preemption_notices() as stop_after, opened as manager:
        state, frozen = _start(config, run, vam, mesh, manager, data)
        start = int(state.step)
        report(start)
        if start == settings.steps:
            return state

        take_step, validate = make_train_step(vam, mesh, state), make_validation(vam, mesh, validation)
        bar = progress(total=settings.steps, initial=start, desc=f"{config.stage} stage", hide=jax.process_index() > 0)
        with bar, MetricWriter(run, start, config) as writer:
            stream, clock, pending = data.batches(start, robots), StepClock(vam, run, started), []
            for step in range(start + 1, settings.steps + 1):
                with clock.stopped():
                    profiler.before(step)
                with clock.waiting():
                    batch = global_batch(next(stream), mesh)
                state, metrics = take_step(state, frozen, batch)
                pending.append(metrics)
                clock.step()
                with clock.stopped():
                    profiler.after(step, metrics)
                bar.update()
                if step == start + 1:  # it compiled
                    jax.block_until_ready(metrics)
                    clock.restart()

                last, stopping = step == settings.steps, stop_after(step)
                saving = step % settings.checkpoint_every == 0 or last or stopping
                validating = bool(validation) and (step % settings.validate_every == 0 or last)
                recording = step % settings.log_every == 0 or saving or validating
                if recording:
                    values = {name: float(np.mean([m[name] for m in jax.device_get(pending)])) for name in metrics}
                    if not np.isfinite([values["loss"], values["grad_norm"]]).all():  # before anything is saved
                        _stop_at_non_finite(values, step - len(pending) + 1, step, run, manager)
                    values |= clock.lap() | device_memory()
                    speed = f", {values['samples_per_second']:.0f} samples/s" if "samples_per_second" in values else ""
                    bar.set_postfix_str(f"loss {values['loss']:.4g}{speed}", refresh=False)
                    pending = []
                    if validating:
                        values |= validate(step, state.inference_params, frozen, writer)
                    writer.write(step, values)
                    report(step)
                if saving:
                    checkpoints.save(manager, state, data.state(step))
                    if stopping and not last:
                        raise PreemptedError(f"stopped after step {step} of {run}, as asked; the same command continues there")
                checkpoints.check_saves(manager)
                if recording:
                    clock.restart()
    return state


def _start(config, run, vam, mesh, manager, data: OpenData) -> tuple[TrainState, Params]:
    """The state and the frozen parameters of the newest checkpoint, or new ones."""
    state = checkpoints.restore(manager, abstract_state(vam, mesh))
    if state is None:
        trained, frozen = split_params(initial_params(config, mesh, data.samples), config)
        checkpoints.save_frozen(run, frozen)
        del frozen  # what counts is what is kept: a checkpoint goes on with it
        state = initial_state(config, place(trained, mesh), mesh)
    else:
        checkpoints.require_same_data(manager, data.state)
    return state, checkpoints.load_frozen(run, mesh=mesh)


@contextlib.contextmanager
def _full_disk_explained(run: epath.Path) -> Iterator[None]:
    """Metrics are written here too, not only checkpoints."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise RunError(f"{run} cannot be written: {error}; the same command continues from the last checkpoint") from error


def _stop_at_non_finite(values: dict[str, float], first: int, last: int, run: epath.Path, manager) -> NoReturn:
    manager.wait_until_finished()  # what is being written is from before
    good = manager.latest_step()
    raise NonFiniteLossError(
        f"loss is {values['loss']} and its gradient's norm {values['grad_norm']} between steps {first} and {last} of {run}; "
        + ("there is no checkpoint before that" if good is None else f"the last good checkpoint is that of step {good}")
    )
