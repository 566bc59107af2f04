"""Measures training and planning on random data; prints one JSON line.

    python launch/benchmark.py training [--size=2b | --config=FILE.py[:ARG]] [--repeats=30]
    python launch/benchmark.py draws --config=configs/quickstart.py:action [--run=RUN]
    python launch/benchmark.py policy [--size=2b | --config=FILE.py[:ARG]] [--image=480x640] [--batch=1] [--reference=torch]
    python launch/benchmark.py cold_start --policy=BUNDLE_OR_RUN [--embodiment=NAME]
    python launch/benchmark.py --config=configs/quickstart.py [--batch_sizes=1,20]

`training`: steps of stage 2, of low-rank adaptation and of full finetuning, beside the rate of the fastest square matrix product
in the same run. `--size=2b` is the published model at 19,200 tokens, one sample a device, from latents; `--size=small` the
quickstart's. Without either, the first where there is an accelerator, else the second, whose numbers say little.

`draws`: what several action noise draws that share a backbone forward buy: variance of the gradient over the noise of a step,
with parameters and batch fixed, and the time of a step, as ratios to those of the first number of --draws. With --run, its
parameters and, if it is there, its data.

`policy`: latency of action chunks with random parameters, stage by stage and of the one program, beside the floor: the time that
the matrix products of the needed work take at the rate of the fastest one in the same run. `--reference=torch` measures the same
from the observed latents on in PyTorch (launch/torch_reference.py), with the context's keys and values recomputed and cached.

`cold_start`: from the start of a process to the first action, with an empty and with a filled compilation cache.

Without a command: steps of both stages, and action chunks for --batch_sizes robots.

Each time is of one call up to the arrival of its result; compilation is reported apart.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import benchmark_policy
import experiment
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from measured import provenance

from mimic_video.batch import Batch, batch_shapes
from mimic_video.config import ExperimentConfig, LoraConfig
from mimic_video.parallel.chips import mfu
from mimic_video.parallel.sharding import global_batch, make_mesh, shardings
from mimic_video.policy.latency import percentiles
from mimic_video.runs.checkpoints import START_PRECISION, load_params, load_tokenizer
from mimic_video.runs.directory import load_embodiments
from mimic_video.runs.storage import RunError, run_path
from mimic_video.stages import join_params, split_params
from mimic_video.training.flops import step_flops, video_tokens
from mimic_video.training.steps import TrainState, abstract_state, make_state, make_train_step
from mimic_video.vam import Params, VideoActionModel

_SIZE = flags.DEFINE_enum("size", None, ["2b", "small"], "What `training` and `policy` measure, in place of --config")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each kind", lower_bound=2)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "20"], "Robots that a chunk is planned for at once")
_RUN = flags.DEFINE_string("run", None, "Run of stage `action` whose parameters `draws` takes; random ones by default")
_DRAWS = flags.DEFINE_list("draws", ["1", "2", "4", "8"], "Numbers of noise draws that `draws` compares, with the first")
_KEYS = flags.DEFINE_integer("keys", 64, "Noise of how many steps `draws` compares", lower_bound=2)
_IMAGE = flags.DEFINE_string("image", None, "Size of the images that `policy` sees, such as 480x640; that of the configuration")
_BATCH = flags.DEFINE_integer("batch", 1, "Robots that `policy` plans for at once", lower_bound=1)
_REFERENCE = flags.DEFINE_enum("reference", None, ["torch"], "What `policy` is compared with in the same run")
_POLICY = flags.DEFINE_string("policy", None, "Bundle or run that `cold_start` starts")
_EMBODIMENT = flags.DEFINE_string("embodiment", None, "Robot that `cold_start` drives, by its dataset's name")
flags.FLAGS.set_default("compilation_cache", False)  # what compiling takes is reported

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {
    "training": {"2b": "configs/published.py:cosmos", "small": "configs/quickstart.py"},
    "policy": {"2b": "configs/published.py:bridge", "small": "configs/quickstart.py:action"},
}
MATRICES = {"cpu": (512, 1024), "other": (4096, 8192, 16384)}  # sizes that the rate of products is measured at


def random_batch(config: ExperimentConfig) -> Batch:
    """A batch of nothing in particular: every frame, view and action counts."""
    random = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if shape.dtype == bool:
            return np.ones(shape.shape, bool)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return random.standard_normal(shape.shape, np.float32).astype(shape.dtype)
        return random.integers(0, 256 if shape.dtype == jnp.uint8 else config.decoder.embodiments, shape.shape, shape.dtype)

    return jax.tree.map(draw, batch_shapes(config, config.train.batch_size))


def random_params(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> tuple[TrainState, Params]:
    """(state, frozen parameters in the precision of training), made where they belong."""
    vam = VideoActionModel(config)

    def make() -> tuple[TrainState, Params]:
        trained, frozen = split_params(vam.init(jax.random.key(0)), config)
        frozen = {name: jax.tree.map(lambda leaf: leaf.astype(vam.dtype(name)), part) for name, part in frozen.items()}  # noqa: B023
        return make_state(config, trained), frozen

    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def random_step(config: ExperimentConfig) -> tuple[Callable[[], Any], float]:
    """A training step on one random batch, to be called for its metrics, and the seconds that compiling it took."""
    vam, mesh = VideoActionModel(config), make_mesh(config.mesh)
    state, frozen = random_params(config, mesh)
    batch = global_batch(random_batch(config), mesh)
    start = time.perf_counter()
    step = make_train_step(vam, mesh, abstract_state(vam, mesh)).lower(state, frozen, batch).compile()
    seconds = time.perf_counter() - start

    def call():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    return call, seconds


def step_times(config: ExperimentConfig, product_rate: float) -> dict[str, Any]:
    """Of training steps on one random batch."""
    call, compiling = random_step(config)
    result: dict[str, Any] = {"compile_s": round(compiling, 2)}
    result |= percentiles(call, _REPEATS.value)
    vam = VideoActionModel(config)
    counted, seconds, devices = step_flops(vam), result["p50_ms"] / 1e3, jax.devices()
    rate, memory = counted.model / seconds, devices[0].memory_stats() or {}
    return result | {
        "steps_per_second": round(1 / seconds, 3),
        "batch_size": config.train.batch_size,
        "tokens_per_second": round(config.train.batch_size * video_tokens(vam) / seconds),
        "model_tflops_per_second": round(rate / 1e12, 4),
        "share_of_product_rate": round(rate / (product_rate * len(devices)), 4),
        "mfu": mfu(rate, devices),
        "attention_share_of_flops": round(counted.attention / counted.model, 4),
        "tokenizer_to_model_flops": round(counted.tokenizer / counted.model, 4),
        "hbm_bytes": {name: memory.get(name) for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")},
    }


def product_rate(dtype: str) -> float:
    """Operations per second of the fastest square matrix product on one device."""
    best = 0.0
    for size in MATRICES.get(jax.default_backend(), MATRICES["other"]):
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)

        @jax.jit
        def chain(x):
            return jax.lax.fori_loop(0, 8, lambda _, y: (y @ x) * jnp.asarray(size**-0.5, dtype), x)  # noqa: B023

        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(chain(x))
            times.append(time.perf_counter() - start)
        best = max(best, 8 * 2 * size**3 / min(times[1:]))
    return best


def training(config: ExperimentConfig) -> dict[str, Any]:
    """Steps of every kind of training."""
    rate = product_rate(config.precision)
    return {
        "product_tflops_per_second": round(rate / 1e12, 4),
        "precision": config.precision,
        "tokens_per_sample": video_tokens(VideoActionModel(config)),
        **{name: step_times(kind, rate) for name, kind in training_kinds(config).items()},
    }


def training_kinds(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """Stage 2, with adapters and of everything: in this order, as the peak of memory is that so far."""
    adapters = config.lora if config.lora.rank else LoraConfig(rank=config.backbone.width // 8)
    return {
        "action": dataclasses.replace(config, stage="action", lora=LoraConfig()),
        "lora": dataclasses.replace(config, stage="video", lora=adapters),
        "full": dataclasses.replace(config, stage="video", lora=LoraConfig()),
    }


def one_sample_a_device(config: ExperimentConfig) -> ExperimentConfig:
    """The published model as `--size=2b` measures it."""
    train = dataclasses.replace(config.train, batch_size=jax.device_count(), remat="attention")
    data = dataclasses.replace(config.data, latents="random")
    return dataclasses.replace(config, train=train, data=data, backbone_run="random")


def chunks(config: ExperimentConfig, size: int) -> dict[str, float]:
    """Action chunks for `size` robots."""
    train = dataclasses.replace(config.train, batch_size=size, micro_batches=1)
    config = dataclasses.replace(config, stage="action", train=train)
    vam, batch = VideoActionModel(config), random_batch(config)
    params, noise = jax.jit(vam.init)(jax.random.key(0)), vam.draw_noise(jax.random.key(0), size)
    start = time.perf_counter()
    plan = jax.jit(vam.sample_actions)
    assert batch.observation.video is not None
    observation = batch.observation._replace(video=batch.observation.video[:, :, : config.data.past_frames])

    def call():
        return plan(params, observation, noise)

    jax.block_until_ready(call())
    return {"first_call_s": round(time.perf_counter() - start, 2), **percentiles(call, _REPEATS.value)}


def both_stages(config: ExperimentConfig) -> dict[str, Any]:
    """What the quickstart's numbers are made of."""
    rate = product_rate(config.precision)
    return {
        **{f"{stage}_training": step_times(dataclasses.replace(config, stage=stage), rate) for stage in ("video", "action")},
        **{f"chunk_for_{size}": chunks(config, int(size)) for size in _BATCH_SIZES.value},
    }


def draws(config: ExperimentConfig) -> dict[str, Any]:
    """Variance of the gradient and time of a step, by number of draws."""
    config = dataclasses.replace(config, stage="action")
    run, mesh = _RUN.value and run_path(_RUN.value), make_mesh(config.mesh)
    if run:
        params = load_params(run, START_PRECISION["action"])[0]
        trained, frozen = split_params(params, config)
    else:
        state, frozen = random_params(config, mesh)
        trained = state.params
    there = run and pathlib.Path(config.data.action_dataset).is_dir()
    batch = real_batch(config, run) if there else random_batch(config)
    table = []
    for number in map(int, _DRAWS.value):
        each = dataclasses.replace(config, train=dataclasses.replace(config.train, action_draws=number))
        timed = step_times(each, product_rate=1.0)
        table.append(
            {"draws": number, "variance": gradient_variance(each, trained, frozen, batch, _KEYS.value), "p50_ms": timed["p50_ms"]}
        )
    for row in table:
        row |= {
            "variance_ratio": round(row["variance"] / table[0]["variance"], 3),
            "time_ratio": round(row["p50_ms"] / table[0]["p50_ms"], 3),
        }
    return {
        "parameters": str(run) if run else "random",
        "data": config.data.action_dataset if there else "random",
        "keys": _KEYS.value,
        "draws": table,
    }


def gradient_variance(config: ExperimentConfig, trained: Params, frozen: Params, batch: Batch, keys: int) -> float:
    """Summed over parameters, of the gradient over the noise of `keys` steps."""
    vam, size = VideoActionModel(config), config.train.batch_size

    @jax.jit
    def add(sums, key, trained, frozen, batch):
        loss = lambda trained: vam.loss(join_params(trained, frozen, config), batch, vam.draw(key, size))[0]  # noqa: E731
        grads = jax.grad(loss)(trained)
        return jax.tree.map(lambda total, grad: (total[0] + grad, total[1] + grad**2), sums, grads, is_leaf=_is_pair)

    sums = jax.tree.map(lambda leaf: (jnp.zeros_like(leaf), jnp.zeros_like(leaf)), trained)
    for key in jax.random.split(jax.random.key(1), keys):
        sums = add(sums, key, trained, frozen, batch)
    pairs = jax.tree.leaves(jax.device_get(sums), is_leaf=_is_pair)
    total = sum(
        float(np.sum(squares, dtype=np.float64) - np.sum(first.astype(np.float64) ** 2) / keys) for first, squares in pairs
    )
    return total / (keys - 1)


def _is_pair(node: Any) -> bool:
    return isinstance(node, tuple)


def real_batch(config: ExperimentConfig, run: epath.Path) -> Batch:
    """The first batch of the run's data."""
    # Only here: what else is measured is measured beside robots, too, where nothing reads data.
    from data_pipelines.assembly import TrainingData

    data = TrainingData(config).open(tokenizer=lambda: load_tokenizer(run, config))
    return next(data.batches(0, load_embodiments(run)))


def policy(config: ExperimentConfig) -> dict[str, Any]:
    """Action chunks, by stage."""
    if _IMAGE.value:
        size = benchmark_policy.parse_size(_IMAGE.value)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=size))
    rate = product_rate(config.precision)
    return benchmark_policy.policy_latency(config, _BATCH.value, _REPEATS.value, rate, _REFERENCE.value == "torch")


COMMANDS: dict[str | None, Callable[[ExperimentConfig], dict[str, Any]]] = {
    "training": training,
    "draws": draws,
    "policy": policy,
    None: both_stages,
}


def main(command: str | None, config: ExperimentConfig) -> None:
    if _SIZE.value == "2b" and command == "training":
        config = one_sample_a_device(config)
    print_result(COMMANDS[command](config))


def print_result(measured: dict[str, Any]) -> None:
    result = {**provenance(), **measured}
    if jax.default_backend() == "cpu":
        result["note"] = "on CPU: this shows that the benchmark runs, not how fast the system is"
    print(json.dumps(result))


def start(_: list[str]) -> None:
    if not _POLICY.value:
        sys.exit("error: --policy is missing: the bundle or run whose start is measured")
    try:
        print_result(benchmark_policy.cold_start(_POLICY.value, _EMBODIMENT.value))
    except RunError as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """Parses the command and the size, which stands for a configuration file."""
    command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if command == "cold_start":
        app.run(start)
    if command not in COMMANDS:
        sys.exit(f"error: there is no benchmark '{command}'; expected training, draws, policy or cold_start")
    names = [argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:]]
    if "reference" in names:  # JAX would take most of a GPU's memory, and PyTorch needs some
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if command in SIZES and "config" not in names:
        if "size" not in names:
            sys.argv.append("--size=" + ("small" if jax.default_backend() == "cpu" else "2b"))
        size = next(argument.partition("=")[2] for argument in sys.argv if argument.lstrip("-").startswith("size="))
        if size in SIZES[command]:  # else the flag's own check says so
            sys.argv.append(f"--config={ROOT / SIZES[command][size]}")
    experiment.run(lambda config: main(command, config), (RunError,))


if __name__ == "__main__":
    run()
