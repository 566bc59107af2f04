"""What a GPU makes of this package: each function is a part of the report, prints lines of JSON and returns those of the last.

`small` is for machines without a GPU: it shows that a part runs, and its numbers say nothing.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import glob
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mimic_video.analysis import forms, training_benchmark
from mimic_video.analysis.aot import policy_program, step_program
from mimic_video.analysis.policy_benchmark import random_policy
from mimic_video.analysis.provenance import provenance
from mimic_video.config import ExperimentConfig
from mimic_video.models.attention import Backend, chosen
from mimic_video.models.attention import attention as attend
from mimic_video.training.flops import video_tokens
from mimic_video.vam import VideoActionModel


def emit(part: str, **values: Any) -> None:
    """Prints a line; what is found early survives a part that does not end."""
    print(json.dumps({"part": part, **values}), flush=True)


def run_forms(command: Sequence[str], small: bool) -> dict[str, Any]:
    """Runs every form once, in processes side by side: most of the time is compiling, which uses one core.

    `command` with --shard=i/n prints what `share_of_forms(..., i, n)` returns.

    XLA does not try out kernels, as it does by default: here they have to run, not to be fast.
    """
    workers = 1 if small else max(1, min(8, (os.cpu_count() or 1) // 2))
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"}
    processes = [
        subprocess.Popen([*command, f"--shard={n}/{workers}"], env=environment, stdout=subprocess.PIPE, text=True)
        for n in range(workers)
    ]

    def lines(process: subprocess.Popen) -> list[dict[str, Any]]:
        found = []
        for line in process.stdout or ():
            if line.startswith("{"):
                sys.stdout.write(line)
                sys.stdout.flush()
                found.append(json.loads(line))
        return found

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = [line for found in pool.map(lines, processes) for line in found if "form" in line]
    failed = [line["form"] for line in results if isinstance(line["first_run_s"], str)]
    passed, codes = len(results) - len(failed), [process.wait() for process in processes]
    failed += [f"shard {number}/{workers}: exit code {code}" for number, code in enumerate(codes) if code]
    return {"passed": passed, "failed": failed}


def share_of_forms(shipped: Mapping[str, ExperimentConfig], number: int, of: int, small: bool) -> dict[str, Any]:
    """A line with the seconds of each form's first run, or what it said if it failed."""

    def filled(shape: Any) -> Any:
        """Arrays of nothing in particular, and nothing that is zero."""
        return jnp.full(shape.shape, 0.02 if jnp.issubdtype(shape.dtype, jnp.floating) else 1, shape.dtype)

    def result(make: Callable[[], Any]) -> float | str:
        start = time.perf_counter()
        try:
            function, shapes = make()
            out = jax.device_get(function(*jax.tree.map(filled, shapes)))
        except Exception as error:  # whatever it is, the report is about it
            return f"{type(error).__name__}: {str(error)[:300]}"
        floats = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return round(time.perf_counter() - start, 1) if all(np.isfinite(leaf).all() for leaf in floats) else "not finite"

    chip = jax.devices()[0]
    makes: list[tuple[str, Callable[[], Any]]] = [
        *((f"step of {name}", functools.partial(step_program, config, [chip])) for name, config in forms.step_forms(shipped)),
        *(
            (f"policy: {name}", functools.partial(policy_program, config, chip, **arguments))
            for name, config, arguments in forms.policy_forms(forms.narrow(shipped["published:bridge"]))
        ),
    ]
    if small:
        makes = [(name, make) for name, make in makes if name in ("step of quickstart:action", "policy: two robots")]
    for name, make in makes[number::of]:
        emit("forms", form=name, first_run_s=result(make))
    return {"shard": f"{number}/{of}"}


def attention(small: bool) -> dict[str, Any]:
    """Rates as the model's operations a second; errors of bfloat16 against float32, over the largest value."""

    def normal(seed: int, *shape: int) -> Any:
        return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)

    def seconds(function: Callable, *arguments: Any) -> float:
        compiled = jax.jit(function).lower(*arguments).compile()
        out = jax.block_until_ready(compiled(*arguments))
        start = time.perf_counter()
        for _ in range(3):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / 3

    flash = chosen(normal(0, 1, 128, 2, 128), normal(0, 1, 128, 2, 128), "auto")
    tokens, heads = (256, 2) if small else (19_200, 16)
    q, k, v = (normal(seed, 1, tokens, heads, 128) for seed in range(3))
    half = jnp.arange(tokens)[None] % 2 == 0
    ways: tuple[tuple[str, Backend, Any], ...] = (
        (flash, flash, None),
        (f"{flash}, half of the keys", flash, half),
        ("xla, in parts", "xla", None),
    )
    for name, backend, mask in ways:

        def loss(q: Any, k: Any, v: Any, backend: Any = backend, mask: Any = mask) -> Any:
            return jnp.sum(attend(q, k, v, mask, backend).astype(jnp.float32))

        work = 4 * tokens * (tokens if mask is None else tokens // 2) * heads * 128
        forward = seconds(functools.partial(attend, mask=mask, backend=backend), q, k, v)
        both = seconds(jax.grad(loss, (0, 1, 2)), q, k, v)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        emit(
            "attention",
            name=name,
            tokens=tokens,
            forward_ms=round(forward * 1e3, 2),
            forward_tflops=round(work / forward / 1e12, 1),
            with_backward_ms=round(both * 1e3, 2),
            with_backward_tflops=round(3.5 * work / both / 1e12, 1),
            peak_bytes=peak,
        )

    inputs = {}
    for name, samples, queries, keys, masked in (
        ("even", 2, 512, 1024, False),
        ("odd", 2, 61, 1001, False),
        ("four draws", 8, 61, 1024, False),
        ("masked", 2, 512, 1024, True),
        ("masked, odd", 4, 17, 1001, True),
    ):
        q, k, v = normal(1, samples, queries, 4, 128), normal(2, 2, keys, 4, 128), normal(3, 2, keys, 4, 128)
        inputs[name] = (q, k, v), jax.random.bernoulli(jax.random.key(4), 0.6, (2, keys)) if masked else None

    def all_of(backend: Backend, dtype: Any) -> Any:
        """Output and gradients of every case, in one program."""

        @jax.jit
        def compute(inputs: Any) -> Any:
            results = {}
            for name, (heads, mask) in inputs.items():
                heads = (x.astype(dtype) for x in heads)
                out, pullback = jax.vjp(lambda q, k, v, mask=mask: attend(q, k, v, mask, backend), *heads)
                results[name] = [x.astype(jnp.float32) for x in (out, *pullback(jnp.cos(out.astype(jnp.float32)).astype(dtype)))]
            return results

        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return compute(inputs)

    exact = all_of("xla", jnp.float32)
    backends: tuple[Backend, ...] = (flash, "xla")
    found = {backend: all_of(backend, jnp.bfloat16) for backend in backends}
    return {
        "errors_of_output_and_gradients": {
            name: {
                backend: [
                    round(float(jnp.abs(one - other).max() / jnp.abs(other).max()), 5)
                    for one, other in zip(results[name], exact[name], strict=True)
                ]
                for backend, results in found.items()
            }
            for name in inputs
        }
    }


def precision(config: ExperimentConfig) -> dict[str, Any]:
    """How far chunks are from those in float32, over the standard deviation of these."""
    ways: tuple[tuple[str, Literal["float32", "bfloat16"], Literal["exact", "int8"]], ...] = (
        ("float32", "float32", "exact"),
        ("bfloat16", "bfloat16", "exact"),
        ("int8", "bfloat16", "int8"),
    )
    chunks = {}
    for name, precision, weights in ways:
        kept = dataclasses.replace(config.policy, weights=weights)
        policy = random_policy(dataclasses.replace(config, precision=precision, policy=kept))
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (2, config.data.past_frames, *config.data.image_size, 3), np.uint8)
        with jax.default_matmul_precision("highest" if name == "float32" else "default"):
            chunks[name] = policy(images, np.zeros((2, config.decoder.proprio_dim), np.float32), [""] * 2)
        del policy
    exact = chunks.pop("float32")
    return {
        name: {
            "rms_over_std": round(float(np.sqrt(np.mean((chunk - exact) ** 2)) / exact.std()), 5),
            "max_over_std": round(float(np.abs(chunk - exact).max() / exact.std()), 5),
        }
        for name, chunk in chunks.items()
    }


def training(config: ExperimentConfig) -> dict[str, Any]:
    """Steps of stage 2, with adapters and of everything."""
    rate = training_benchmark.product_rate(config.precision)
    for name, kind in training_benchmark.training_kinds(config).items():
        times = training_benchmark.step_times(kind, rate, repeats=30)
        emit("training", kind=name, tokens_per_sample=video_tokens(VideoActionModel(kind)), **times)
    return {"product_tflops_per_second": round(rate / 1e12, 4)}


def profile(policy: ExperimentConfig, step: ExperimentConfig) -> dict[str, Any]:
    """The share of all kernels' time that each kernel's name, up to numbers, has."""
    chunks = _kernels(functools.partial(random_policy(policy), *_nothing(policy)))
    call, _ = training_benchmark.random_step(step)
    return {"policy": chunks, "full step": _kernels(call), "device": jax.devices()[0].device_kind}


def _nothing(config: ExperimentConfig) -> tuple[np.ndarray, np.ndarray, list[str]]:
    images = np.zeros((1, config.data.past_frames, *config.data.image_size, 3), np.uint8)
    return images, np.zeros((1, config.decoder.proprio_dim), np.float32), [""]


def _kernels(call: Callable[[], Any]) -> dict[str, Any]:
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(call())
            wall = time.perf_counter() - start
        [file] = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(file) as stream:
            events = json.load(stream)["traceEvents"]
    devices = {event["pid"] for event in events if event.get("name") == "process_name" and "GPU" in event["args"]["name"]}
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["pid"] in devices and event["args"]["name"].startswith("Stream")
    }
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            times[event["name"].rstrip("0123456789_")] += event["dur"]
    total = sum(times.values())
    return {
        "wall_ms": round(wall * 1e3, 2),
        "kernels_ms": round(total / 1e3, 2),
        "top": [[name, round(each / 1e3, 2), round(each / total, 3)] for name, each in times.most_common(12)],
    }


def device(small: bool) -> dict[str, Any]:
    """The machine, and its rates."""
    size = 2**20 if small else 2**31
    x, add, times = jnp.zeros(size, jnp.int8), jax.jit(lambda x: x + 1), []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return {
        **provenance(),
        "capability": getattr(jax.devices()[0], "compute_capability", None),
        "copy_gb_per_s": round(2 * size / min(times) / 1e9, 1),
        "product_tflops": round(training_benchmark.product_rate("bfloat16") / 1e12, 4),
    }


def run_part(part: str, command: Sequence[str], root: pathlib.Path, seconds: float) -> Iterator[str]:
    """The lines of a part, which `command` prints in a process of its own, as they come, and what it said last if it failed."""
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    start, late = time.perf_counter(), threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            yield from (line.strip() for line in process.stdout or () if line.startswith("{"))
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # interrupted from the keyboard
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        if code:
            reason = f"stopped after {seconds:.0f} s" if late.is_set() else f"exit code {code}"
            yield json.dumps({"part": part, "error": reason, "said": errors.read()[-1500:]})
    yield json.dumps({"part": part, "seconds": round(time.perf_counter() - start, 1)})
