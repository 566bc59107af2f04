"""One training run from start, or from where it was interrupted, to its last step."""

import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mimic_video.config import ExperimentConfig
from mimic_video.training import checkpoints
from mimic_video.training.metrics import MetricWriter
from mimic_video.training.sharding import global_batch, make_mesh, require_divisible
from mimic_video.training.steps import (
    TrainState,
    abstract_state,
    make_state,
    make_train_step,
    make_validation_step,
    place,
    split_params,
)
from mimic_video.vam import Params, VideoActionModel

NumpyBatch = dict[str, np.ndarray]


class NonFiniteLossError(RuntimeError):
    """The loss stopped being a number; the last checkpoint before it is kept."""


def train(
    config: ExperimentConfig,
    run: pathlib.Path,
    init: Callable[[], Params],
    batches: Callable[[int], Iterator[NumpyBatch]],
    data: Callable[[int], Mapping[str, Any]],
    validation: Sequence[NumpyBatch] = (),
) -> TrainState:
    """Trains `config.stage` in the directory `run`, resuming from its newest checkpoint if it has one.

    Args:
        init: all parameters at the start: called unless there is a checkpoint.
        batches: step → the batches from that step on, this process's part; a function of (seed, step) alone.
        data: step → where `batches` stand after it and what they are drawn from, for JSON; kept with each checkpoint.
        validation: fixed batches that validation errors are averaged over.

    Returns:
        The final state; the run directory holds it too.

    Raises:
        ConfigError: if the directory holds a run with another configuration.
        RunError: if it holds one that was trained on other data.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    checkpoints.write_config(run, config)
    mesh, vam = make_mesh(config.mesh), VideoActionModel(config)
    require_divisible(config.train.batch_size, mesh)
    with checkpoints.open_checkpoints(run, config.train.keep_checkpoints) as manager:
        if manager.latest_step() is None:
            trained, frozen = split_params(init(), config)
            checkpoints.save_frozen(run, frozen)
            frozen = checkpoints.load_frozen(run)  # what an earlier start of this run kept, if there was one
            state = place(make_state(config, trained), mesh)
        else:
            frozen = checkpoints.load_frozen(run)
            state = checkpoints.restore(manager, abstract_state(vam, mesh))
            checkpoints.require_same_data(manager, data)
        start = int(state.step)
        if start < config.train.steps:
            state = _run_steps(config, vam, mesh, state, place(frozen, mesh), batches(start), data, validation, run, manager)
    return state


def _run_steps(config, vam, mesh, state, frozen, batches, data, validation, run, manager) -> TrainState:
    settings, start = config.train, int(state.step)
    step_function = make_train_step(vam, mesh, state)
    validate = make_validation_step(vam, mesh)
    validation = [global_batch(batch, mesh) for batch in validation]
    writer = MetricWriter(run, start)
    progress = tqdm(total=settings.steps, initial=start, desc=f"{config.stage} stage", unit="step", mininterval=1.0)
    pending, waited, clock = [], 0.0, time.perf_counter()
    for step in range(start + 1, settings.steps + 1):
        asked = time.perf_counter()
        batch = global_batch(next(batches), mesh)
        waited += time.perf_counter() - asked
        state, metrics = step_function(state, frozen, batch)
        pending.append(metrics)
        progress.update()
        last = step == settings.steps
        saving = step % settings.checkpoint_every == 0 or last
        validating = bool(validation) and (step % settings.validate_every == 0 or last)
        if step % settings.log_every == 0 or saving or validating:
            values = {name: float(np.mean([m[name] for m in jax.device_get(pending)])) for name in metrics}
            elapsed = time.perf_counter() - clock
            if not np.isfinite(values["loss"]):  # before anything is saved
                raise NonFiniteLossError(f"loss is {values['loss']} between steps {step - len(pending) + 1} and {step} of {run}")
            values |= {"samples_per_second": len(pending) * settings.batch_size / elapsed, "data_wait_fraction": waited / elapsed}
            progress.set_postfix_str(f"loss {values['loss']:.4g}, {values['samples_per_second']:.0f} samples/s")
            pending, waited = [], 0.0
            if validating:
                values |= _validation_metrics(validate, state, frozen, validation)
            writer.write(step, values)
            clock = time.perf_counter()
        if saving:
            checkpoints.save(manager, state, data(step))
    progress.close()
    writer.close()
    return state


def _validation_metrics(validate, state: TrainState, frozen: Params, batches) -> dict[str, float]:
    collected = [jax.device_get(validate(state.inference_params, frozen, batch)) for batch in batches]
    return {f"validation_{name}": float(np.mean([metrics[name] for metrics in collected])) for name in collected[0]}
