"""What a GPU makes of this repository: does everything run, is it right, how fast is it. Prints lines of JSON.

    python launch/gpu_report.py [--parts=forms,attention] [--seconds=900] [--small] [--out=FILE.jsonl]

    device     what it is, and its rates of matrix products and copies
    forms      a training step of every shipped experiment and every form of the policy, once, with narrow networks
    attention  cuDNN's attention beside XLA's and float32: outputs, gradients, and rates at the published number of tokens
    precision  chunks of a policy in bfloat16, and with weights of eight bits, beside float32
    golden     both networks beside vectors of the published implementation (tests/test_golden.py)
    policy     latency of the 2B policy by stages, beside its floor and PyTorch (launch/benchmark.py policy)
    training   steps of stage 2, of adapters and of everything, from latents of 19,200 tokens (launch/benchmark.py training)
    profile    the kernels that a full finetuning step and a policy spend their time in

Needs the package without extras, and for `policy` what --reference=torch needs; nothing is downloaded. Every part is a process of
its own with a share of the time, so that one that fails costs only itself; with fewer --seconds than their sum, the last ones
are left out. Exit code: 0 if every part ended and all forms ran. --small is for machines without a GPU: it shows that the report
runs, and its numbers say nothing.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import glob
import gzip
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import forms
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = {  # seconds
    "device": 40,
    "attention": 90,
    "forms": 120,
    "training": 240,
    "policy": 240,
    "golden": 60,
    "precision": 90,
    "profile": 150,
}
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"Of {', '.join(PARTS)}")
_PART = flags.DEFINE_enum("part", None, list(PARTS), "Runs one part in this process")
_SHARE = flags.DEFINE_string("share", None, "Of `forms`, a part of them, such as 0/8")
_SECONDS = flags.DEFINE_integer("seconds", sum(PARTS.values()), "For all parts together", lower_bound=1)
_SMALL = flags.DEFINE_bool("small", False, "Sizes for machines without a GPU")
_OUT = flags.DEFINE_string("out", None, "File that the lines are appended to")


def emit(part: str, **values: Any) -> None:
    """Prints a line; what is found early survives a part that does not end."""
    print(json.dumps({"part": part, **values}), flush=True)


def run_forms() -> dict[str, Any]:
    """Runs every form once, in processes side by side: most of the time is compiling, which uses one core.

    XLA does not try out kernels, as it does by default: here they have to run, not to be fast.
    """
    workers = 1 if _SMALL.value else max(1, min(8, (os.cpu_count() or 1) // 2))
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"}
    command = [sys.executable, __file__, "--part=forms", *(["--small"] if _SMALL.value else [])]
    processes = [
        subprocess.Popen([*command, f"--share={n}/{workers}"], env=environment, stdout=subprocess.PIPE, text=True)
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
    failed += [f"share {number}/{workers}: exit code {code}" for number, code in enumerate(codes) if code]
    return {"passed": passed, "failed": failed}


def share_of_forms(number: int, of: int) -> dict[str, Any]:
    """A line with the seconds of each form's first run, or what it said if it failed."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mimic_video.analysis.aot import policy_program, step_program

    def filled(shape: Any) -> Any:
        """Of nothing in particular, and nothing that is zero."""
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
        *((f"step of {name}", functools.partial(step_program, config, [chip])) for name, config in forms.step_forms()),
        *(
            (f"policy: {name}", functools.partial(policy_program, config, chip, **arguments))
            for name, config, arguments in forms.policy_forms(forms.narrow(forms.shipped("published:bridge")))
        ),
    ]
    if _SMALL.value:
        makes = [(name, make) for name, make in makes if name in ("step of quickstart:action", "policy: two robots")]
    for name, make in makes[number::of]:
        emit("forms", form=name, first_run_s=result(make))
    return {"share": f"{number}/{of}"}


def attention() -> dict[str, Any]:
    """Rates as the model's operations a second; errors of bfloat16 against float32, over the largest value."""
    import jax
    import jax.numpy as jnp

    from mimic_video.models.attention import Backend, chosen
    from mimic_video.models.attention import attention as attend

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
    tokens, heads = (256, 2) if _SMALL.value else (19_200, 16)
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


def precision() -> dict[str, Any]:
    """How far chunks are from those in float32, over the standard deviation of these."""
    import jax
    import numpy as np
    from benchmark_policy import random_policy

    config = forms.shipped("quickstart:action" if _SMALL.value else "published:bridge")
    if not _SMALL.value:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=(240, 320)))
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


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def golden() -> dict[str, Any]:
    """What pytest says last; products in float32 rather than in TF32, which GPUs have by default."""
    platform = "cpu" if _SMALL.value else "cuda"
    ended = _command("-m", "pytest", "-q", "tests/test_golden.py", JAX_PLATFORMS=platform, JAX_DEFAULT_MATMUL_PRECISION="highest")
    return {"exit_code": ended.returncode, "said": ended.stdout.strip().splitlines()[-8:]}


def policy() -> dict[str, Any]:
    settings = [("64x64", "1")] if _SMALL.value else [("480x640", "1"), ("240x320", "1"), ("480x640", "8")]
    for image, batch in settings:
        compared = batch == "1" and importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch")
        arguments = [f"--size={'small' if _SMALL.value else '2b'}", f"--image={image}", f"--batch={batch}", "--repeats=10"]
        ended = _command("launch/benchmark.py", "policy", *arguments, *(["--reference=torch"] if compared else []))
        emit(
            "policy",
            **(
                json.loads(ended.stdout.splitlines()[-1])
                if not ended.returncode
                else {"image": image, "batch": batch, "error": ended.stderr.strip()[-1500:]}
            ),
        )
    return {"measured": [f"{image}, batch {batch}" for image, batch in settings]}


def training() -> dict[str, Any]:
    import benchmark

    from mimic_video.training.flops import video_tokens
    from mimic_video.vam import VideoActionModel

    config = benchmark.one_sample_a_device(forms.shipped("published:cosmos"))
    config = forms.narrow(config) if _SMALL.value else config
    rate = benchmark.product_rate(config.precision)
    for name, kind in benchmark.training_kinds(config).items():
        emit("training", kind=name, tokens_per_sample=video_tokens(VideoActionModel(kind)), **benchmark.step_times(kind, rate))
    return {"product_tflops_per_second": round(rate / 1e12, 1)}


def profile() -> dict[str, Any]:
    """Of every kernel's name, up to numbers, the share of all kernels' time."""
    import benchmark
    import jax
    from benchmark_policy import random_policy

    config = forms.shipped("published:bridge")
    config = forms.narrow(config) if _SMALL.value else config
    chunks = _kernels(functools.partial(random_policy(config), *_nothing(config)))
    config = forms.shipped("published:cosmos")
    config = forms.narrow(config) if _SMALL.value else benchmark.one_sample_a_device(config)
    step, _ = benchmark.random_step(config)
    return {"policy": chunks, "full step": _kernels(step), "device": jax.devices()[0].device_kind}


def _nothing(config: Any) -> tuple[Any, Any, list[str]]:
    import numpy as np

    images = np.zeros((1, config.data.past_frames, *config.data.image_size, 3), np.uint8)
    return images, np.zeros((1, config.decoder.proprio_dim), np.float32), [""]


def _kernels(call: Callable[[], Any]) -> dict[str, Any]:
    import jax

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


def device() -> dict[str, Any]:
    """The machine, and its rates."""
    import benchmark
    import jax
    import jax.numpy as jnp
    from measured import provenance

    size = 2**20 if _SMALL.value else 2**31
    x, add, times = jnp.zeros(size, jnp.int8), jax.jit(lambda x: x + 1), []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return {
        **provenance(),
        "capability": getattr(jax.devices()[0], "compute_capability", None),
        "copy_gb_per_s": round(2 * size / min(times) / 1e9),
        "product_tflops": round(benchmark.product_rate("bfloat16") / 1e12, 1),
    }


FUNCTIONS = {
    "device": device,
    "attention": attention,
    "forms": run_forms,
    "training": training,
    "policy": policy,
    "golden": golden,
    "precision": precision,
    "profile": profile,
}


def require_gpu() -> None:
    """Ends this process with a line for people unless there is a GPU, or what is asked for needs none."""
    # `golden`, `policy` and the shares of `forms` start JAX in processes of their own, beside which this one takes no memory.
    import jax

    if not _SMALL.value and jax.default_backend() != "gpu":
        sys.exit("error: JAX finds no GPU here; --small shows on a CPU that the report runs")


def run_part(part: str, seconds: float) -> Iterator[str]:
    """The lines of a part in a process of its own, as they come, and what it said last if it failed."""
    flag = ["--small"] if _SMALL.value else []
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    start, late = time.perf_counter(), threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, f"--part={part}", *flag],
            cwd=ROOT,
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


def main(_: list[str]) -> None:
    if _SHARE.value:
        number, of = map(int, _SHARE.value.split("/"))
        emit("forms", **share_of_forms(number, of))
        return
    if _PART.value:
        require_gpu()
        emit(_PART.value, **FUNCTIONS[_PART.value]())
        return
    if unknown := set(_PARTS.value) - PARTS.keys():
        sys.exit(f"error: --parts has {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    end, failed = time.monotonic() + _SECONDS.value, False
    for part in _PARTS.value:
        left = end - time.monotonic()
        for line in run_part(part, min(PARTS[part], left)) if left > 0 else (json.dumps({"part": part, "error": "no time"}),):
            print(line, flush=True)
            if _OUT.value:
                with open(_OUT.value, "a") as file:
                    file.write(line + "\n")
            found = json.loads(line)
            failed |= bool("error" in found or found.get("failed") or found.get("exit_code"))
    sys.exit(failed)


if __name__ == "__main__":
    app.run(main)
