"""Measures training and planning on random data; prints one JSON line.

    python launch/benchmark.py training [--model=2b | --config=FILE.py[:ARG]] [--repeats=30]
    python launch/benchmark.py draws --config=configs/quickstart.py:action [--workdir=RUN]
    python launch/benchmark.py policy [--model=2b | --config=FILE.py[:ARG]] [--image_size=480x640] [--batch_size=1]
    python launch/benchmark.py serving [--model=2b | --config=FILE.py[:ARG]] [--batch_size=1 --batch_size=8]
    python launch/benchmark.py cold_start --policy=BUNDLE_OR_RUN [--embodiment=NAME]
    python launch/benchmark.py --config=configs/quickstart.py [--batch_size=1 --batch_size=20]

`training`: steps of stage 2, of low-rank adaptation and of full finetuning, beside the rate of the fastest square matrix product
in the same run. `--model=2b` is the published model at 19,200 tokens, one sample a device, from latents; `--model=small` the
quickstart's. Without either, the first where there is an accelerator, else the second, whose numbers say little.

`draws`: what several action noise draws that share a backbone forward buy: variance of the gradient over the noise of a step,
with parameters and batch fixed, and the time of a step, as ratios to those of the first number of --draws. With --workdir, that
run's parameters and, if it is there, its data.

`policy`: latency of action chunks with random parameters, stage by stage and of the one program, beside the floor: the time that
the matrix products of the needed work take at the rate of the fastest one in the same run. `--reference=torch` measures the same
from the observed latents on in PyTorch (mimic_video/analysis/torch_reference.py), with the context's keys and values recomputed
and cached.

`serving`: chunks a second, and the time that a robot waits for its own, of the policy server with random parameters: for every
--batch_size as the largest batch, and 1, 2, 4, ... robots that ask all the time, --repeats times each. Needs the extra `serve`.

`cold_start`: from the start of a process to the first action, with an empty and with a filled compilation cache.

Without a command: steps of both stages, and action chunks for every --batch_size.

Each time is of one call up to the arrival of its result; compilation is reported apart.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import experiment
import jax
from absl import flags
from etils import epath

from mimic_video.analysis import policy_benchmark, training_benchmark
from mimic_video.analysis.provenance import provenance
from mimic_video.batch import Batch
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.runs.checkpoints import START_PRECISION, load_params, load_tokenizer
from mimic_video.runs.directory import load_embodiments
from mimic_video.runs.storage import RunError, run_path

_MODEL = flags.DEFINE_enum("model", None, ["2b", "small"], "What is measured in place of --config, but by `draws`")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each kind, or requests of each robot", lower_bound=2)
_BATCH_SIZES = flags.DEFINE_multi_integer("batch_size", None, "Robots that a chunk is planned for at once, or may be")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run of stage `action` whose parameters `draws` takes; random ones by default")
_DRAWS = flags.DEFINE_list("draws", ["1", "2", "4", "8"], "Numbers of noise draws that `draws` compares, with the first")
_KEYS = flags.DEFINE_integer("keys", 64, "Noise of how many steps `draws` compares", lower_bound=2)
_IMAGE_SIZE = experiment.define_size("image_size", None, "What `policy` sees; that of the configuration by default")
_REFERENCE = flags.DEFINE_enum("reference", None, ["torch"], "What `policy` is compared with in the same run")
_POLICY = flags.DEFINE_string("policy", None, "Bundle, also hf://USER/NAME, or run that `cold_start` starts")
_EMBODIMENT = flags.DEFINE_string("embodiment", None, "Robot that `cold_start` drives, if the policy knows several")

ROOT = pathlib.Path(__file__).resolve().parent.parent
POLICIES = {"2b": "configs/published.py:bridge", "small": "configs/quickstart.py:action"}
MODELS = {
    "training": {"2b": "configs/published.py:cosmos", "small": "configs/quickstart.py"},
    "policy": POLICIES,
    "serving": POLICIES,
}


def training(config: ExperimentConfig) -> dict[str, Any]:
    if _MODEL.value == "2b":
        config = training_benchmark.one_sample_a_device(config)
    return training_benchmark.training(config, _REPEATS.value)


def draws(config: ExperimentConfig) -> dict[str, Any]:
    run = run_path(_WORKDIR.value) if _WORKDIR.value else None
    params = load_params(run, START_PRECISION["action"])[0] if run else None
    there = run and pathlib.Path(config.data.action_dataset).expanduser().is_dir()
    batch = real_batch(dataclasses.replace(config, stage="action"), run) if run and there else None
    numbers = list(map(int, _DRAWS.value))
    return {
        "parameters": str(run) if run else "random",
        "data": config.data.action_dataset if there else "random",
        "keys": _KEYS.value,
        "draws": training_benchmark.draws(config, numbers, _KEYS.value, _REPEATS.value, params, batch),
    }


def real_batch(config: ExperimentConfig, run: epath.Path) -> Batch:
    """The first batch of the run's data."""
    # Only here: what else is measured is measured beside robots, too, where nothing reads data.
    from data_pipelines.assembly import TrainingData

    data = TrainingData(config).open(tokenizer=lambda: load_tokenizer(run, config))
    return next(data.batches(0, load_embodiments(run)))


def policy(config: ExperimentConfig) -> dict[str, Any]:
    if len(sizes := _BATCH_SIZES.value or [1]) > 1:
        raise ConfigError(f"--batch_size is given {len(sizes)} times; `policy` measures one")
    if _IMAGE_SIZE.value:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=_IMAGE_SIZE.value))
    rate = training_benchmark.product_rate(config.precision)
    return policy_benchmark.policy_latency(config, sizes[0], _REPEATS.value, rate, _REFERENCE.value == "torch")


def serving(config: ExperimentConfig) -> dict[str, Any]:
    # Only here: it needs the package of the server.
    from mimic_video.analysis.serving_benchmark import serving

    return serving(dataclasses.replace(config, stage="action"), _BATCH_SIZES.value or (1, 2, 4, 8), _REPEATS.value)


def cold_start() -> dict[str, Any]:
    if not _POLICY.value:
        raise ConfigError("--policy is missing: the bundle or run whose start is measured")
    return policy_benchmark.cold_start(_POLICY.value, _EMBODIMENT.value)


def both_stages(config: ExperimentConfig) -> dict[str, Any]:
    return training_benchmark.both_stages(config, _BATCH_SIZES.value or (1, 20), _REPEATS.value)


COMMANDS: dict[str | None, Callable[..., dict[str, Any]]] = {
    "training": training,
    "draws": draws,
    "policy": policy,
    "serving": serving,
    "cold_start": cold_start,
    None: both_stages,
}


def main(command: str | None, *config: ExperimentConfig) -> None:
    result = {**provenance(), **COMMANDS[command](*config)}
    if jax.default_backend() == "cpu":
        result["note"] = "on CPU: this shows that the benchmark runs, not how fast the system is"
    print(json.dumps(result))


def run() -> None:
    """Parses the command and the model, which stands for a configuration file."""
    command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if command not in COMMANDS:
        sys.exit(f"error: there is no benchmark '{command}'; expected {', '.join(filter(None, COMMANDS))}")
    names = [argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:]]
    if "reference" in names:  # JAX would take most of a GPU's memory, and PyTorch needs some
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if command in MODELS and "config" not in names:
        if "model" not in names:
            sys.argv.append("--model=" + ("small" if jax.default_backend() == "cpu" else "2b"))
        model = next(argument.partition("=")[2] for argument in sys.argv if argument.lstrip("-").startswith("model="))
        if model in MODELS[command]:  # else the flag's own check says so
            sys.argv.append(f"--config={ROOT / MODELS[command][model]}")
    experiment.run(functools.partial(main, command), (RunError,), config=command != "cold_start", compilation_cache=False)


if __name__ == "__main__":
    run()
