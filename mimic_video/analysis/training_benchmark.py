"""Times of training steps and action chunks on random data, and what more noise draws buy."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimic_video.batch import Batch, batch_shapes
from mimic_video.config import ExperimentConfig, LoraConfig
from mimic_video.parallel.chips import mfu
from mimic_video.parallel.sharding import global_batch, make_mesh, shardings
from mimic_video.policy.latency import percentiles
from mimic_video.stages import join_params, split_params
from mimic_video.training.flops import step_flops, video_tokens
from mimic_video.training.steps import TrainState, abstract_state, make_state, make_train_step
from mimic_video.vam import Params, VideoActionModel

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
        return make_state(config, trained), vam.cast(frozen)

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


def step_times(config: ExperimentConfig, product_rate: float, repeats: int) -> dict[str, Any]:
    """Times of training steps on one random batch."""
    call, compiling = random_step(config)
    result: dict[str, Any] = {"compile_s": round(compiling, 2)}
    result |= percentiles(call, repeats)
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


def training(config: ExperimentConfig, repeats: int) -> dict[str, Any]:
    """Steps of every kind of training."""
    rate = product_rate(config.precision)
    return {
        "product_tflops_per_second": round(rate / 1e12, 4),
        "precision": config.precision,
        "tokens_per_sample": video_tokens(VideoActionModel(config)),
        **{name: step_times(kind, rate, repeats) for name, kind in training_kinds(config).items()},
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
    """The published model at one sample a device."""
    train = dataclasses.replace(config.train, batch_size=jax.device_count(), remat="attention")
    data = dataclasses.replace(config.data, latents="random")
    return dataclasses.replace(config, train=train, data=data, backbone_run="random")


def chunks(config: ExperimentConfig, size: int, repeats: int) -> dict[str, float]:
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
    return {"first_call_s": round(time.perf_counter() - start, 2), **percentiles(call, repeats)}


def both_stages(config: ExperimentConfig, batch_sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """What the quickstart's numbers are made of."""
    rate = product_rate(config.precision)
    return {
        **{
            f"{stage}_training": step_times(dataclasses.replace(config, stage=stage), rate, repeats)
            for stage in ("video", "action")
        },
        **{f"chunk_for_{size}": chunks(config, size, repeats) for size in batch_sizes},
    }


def draws(
    config: ExperimentConfig, numbers: Sequence[int], keys: int, repeats: int, params: Params | None, batch: Batch | None
) -> list[dict[str, Any]]:
    """Variance of the gradient over the noise of `keys` steps and time of a step, by number of draws; ratios are to the first.

    Args:
        params: random ones if there are none.
        batch: a random one if there is none.
    """
    config = dataclasses.replace(config, stage="action")
    if params is None:
        state, frozen = random_params(config, make_mesh(config.mesh))
        trained = state.params
    else:
        trained, frozen = split_params(params, config)
    batch = random_batch(config) if batch is None else batch
    table = []
    for number in numbers:
        each = dataclasses.replace(config, train=dataclasses.replace(config.train, action_draws=number))
        milliseconds = step_times(each, 1.0, repeats)["p50_ms"]
        table.append({"draws": number, "variance": gradient_variance(each, trained, frozen, batch, keys), "p50_ms": milliseconds})
    for row in table:
        row |= {
            "variance_ratio": round(row["variance"] / table[0]["variance"], 3),
            "time_ratio": round(row["p50_ms"] / table[0]["p50_ms"], 3),
        }
    return table


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
