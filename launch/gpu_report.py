"""What a GPU makes of this repository: does everything run, is it right, how fast is it. Prints one JSON line a part.

    python launch/gpu_report.py [--parts=forms,attention] [--seconds=480] [--small] [--out=FILE.jsonl]

    device     what it is, and its rates of matrix products and copies
    forms      a training step of every shipped experiment and every form of the policy, once, with narrow networks
    attention  cuDNN's attention beside XLA's and float32: outputs, gradients, and rates at the published number of tokens
    precision  chunks of a policy in bfloat16, and with weights of eight bits, beside float32
    golden     both networks beside vectors of the published implementation (tests/test_golden.py)
    policy     latency of the 2B policy by stages, beside its floor and PyTorch (launch/benchmark.py policy)
    training   steps of stage 2, of adapters and of everything, from latents of 19,200 tokens (launch/benchmark.py training)
    profile    the kernels that a full finetuning step and a policy spend their time in

Needs the package without extras, and for `policy` what --reference=torch needs; nothing is downloaded. Every part is a process of
its own with a share of the time, so that one that fails costs only itself. --small is for machines without a GPU: it shows that
the report runs, and its numbers say nothing.
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
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = {  # seconds
    "device": 40, "attention": 60, "forms": 150, "policy": 150, "training": 200, "golden": 60, "precision": 60, "profile": 120,
}  # fmt: skip
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"Of {', '.join(PARTS)}")
_PART = flags.DEFINE_enum("part", None, list(PARTS), "Runs one part in this process")
_SECONDS = flags.DEFINE_integer("seconds", 480, "For all parts together", lower_bound=1)
_SMALL = flags.DEFINE_bool("small", False, "Sizes for machines without a GPU")
_OUT = flags.DEFINE_string("out", None, "File that the lines are appended to")

EXPERIMENTS = (
    "published:bridge", "published:libero", "published:bridge_video", "published:libero_video", "published:cosmos",
    "pretrain:video_v5e", "pretrain:action_v5e", "small:half_video", "small:half_action", "small:colab_video",
    "small:colab_action", "quickstart:video", "quickstart:action",
)  # fmt: skip


def shipped(name: str) -> Any:
    """The experiment of a configuration file and its argument, on one device."""
    from mimic_video.config import MeshConfig, experiment_from

    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(experiment_from(module.get_config(argument).to_dict()), mesh=MeshConfig())


def narrow(config: Any, **train: Any) -> Any:
    """The experiment with two narrow blocks a network and small windows, of latents; what decides about programs is as it was."""

    def head(width: int, heads: int) -> int:
        return min(width // heads, 128)

    backbone, decoder = config.backbone, config.decoder
    backbone = dataclasses.replace(backbone, width=2 * head(backbone.width, backbone.num_heads), num_heads=2, num_blocks=2,
                                   hidden_block=1, text_width=64, adaln_lora_dim=16)  # fmt: skip
    decoder = dataclasses.replace(decoder, width=2 * head(decoder.width, decoder.num_heads), num_heads=2, num_blocks=2,
                                  adaln_lora_dim=16, time_rank=32)  # fmt: skip
    data = dataclasses.replace(config.data, image_size=(64, 96), future_frames=8, latents="precomputed")
    micro = config.train.micro_batches
    kept = dataclasses.replace(config.train, batch_size=2 * micro, warmup_steps=0, **train)
    return dataclasses.replace(
        config, backbone=backbone, decoder=decoder, data=data, train=kept, backbone_run="any",
        text=dataclasses.replace(config.text, kind="hash", rows=16, width=64),
        tokenizer=dataclasses.replace(config.tokenizer, width=16),
        lora=dataclasses.replace(config.lora, rank=min(config.lora.rank, 8)),
    )  # fmt: skip


def policy_forms(config: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, experiment, arguments of `policy_program`) of all that a policy's program may be."""
    import numpy as np

    from mimic_video.training.aot import widest_robot
    from mimic_video.transforms import compute_statistics

    def changed(**parts: Any) -> Any:
        """With fields of parts of the experiment changed, or fields of its own."""
        values = {name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
                  for name, value in parts.items()}  # fmt: skip
        return dataclasses.replace(config, **values)

    views = changed(data={"cameras": ("primary", "wrist")}, backbone={"views": 2})
    robots = changed(decoder={"embodiments": 2})
    robot = widest_robot(robots)
    four = compute_statistics(np.random.default_rng(0).normal(size=(100, config.decoder.action_horizon, 4)))
    narrower = dataclasses.replace(robot, statistics={**robot.statistics, "action": four})
    for batch in (1, 8):
        yield f"one chunk, batch {batch}", config, {"batch": batch}
        yield f"three samples, batch {batch}", config, {"batch": batch, "samples": 3}
        yield f"real-time chunking, batch {batch}", config, {"batch": batch, "continuing": True}
    yield "video denoised", changed(policy={"stop_step": 2}), {"batch": 1}
    yield "int8", changed(policy={"weights": "int8"}), {"batch": 1}
    yield "float32", changed(precision="float32"), {"batch": 1}
    yield "float32, three samples", changed(precision="float32"), {"batch": 2, "samples": 3}
    yield "two cameras", views, {"batch": 2}
    yield "a missing camera", views, {"batch": 2, "robot": dataclasses.replace(widest_robot(views), cameras=("primary",))}
    yield "two robots", robots, {"batch": 2, "samples": 3}
    yield "a narrower robot, real-time chunking", robots, {"batch": 2, "continuing": True, "robot": narrower}


def step_forms() -> Iterator[tuple[str, Any]]:
    """(name, narrow experiment) of a step of every shipped experiment, and of what none of them has."""
    for name in EXPERIMENTS:
        yield name, narrow(shipped(name))
    bridge, video = narrow(shipped("published:bridge")), narrow(shipped("published:bridge_video"))
    yield "action, from frames", dataclasses.replace(bridge, data=dataclasses.replace(bridge.data, latents=""))
    yield "eight draws", dataclasses.replace(bridge, train=dataclasses.replace(bridge.train, action_draws=8))
    yield "two robots", dataclasses.replace(bridge, decoder=dataclasses.replace(bridge.decoder, embodiments=2))
    for name, config in (("action, two cameras", bridge), ("video, two cameras", video)):
        data = dataclasses.replace(config.data, cameras=("primary", "wrist"))
        yield name, dataclasses.replace(config, data=data, backbone=dataclasses.replace(config.backbone, views=2))
    for precision, remat in (("float32", "none"), ("bfloat16", "attention")):
        for name, config in (("action", bridge), ("video", video)):
            train = dataclasses.replace(config.train, remat=remat)
            yield f"{name}, {precision}, remat {remat}", dataclasses.replace(config, precision=precision, train=train)


def forms() -> dict[str, Any]:
    """Seconds of every form's first run, and what those that failed said."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mimic_video.training.aot import policy_program, step_program

    def filled(shape: Any) -> Any:
        """Of nothing in particular, and nothing that is zero."""
        return jnp.full(shape.shape, 0.02 if jnp.issubdtype(shape.dtype, jnp.floating) else 1, shape.dtype)

    def result(make: Callable[[], Any]) -> float | str:
        start = time.perf_counter()
        try:
            function, shapes = make()
            out = jax.device_get(function(*jax.tree.map(filled, shapes)))
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        floats = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return round(time.perf_counter() - start, 1) if all(np.isfinite(leaf).all() for leaf in floats) else "not finite"

    def run(name: str) -> float | str:
        print(json.dumps({"part": "forms", "form": name, "first_run_s": (ended := result(makes[name]))}), flush=True)
        return ended

    device = jax.devices()[0]
    makes: dict[str, Callable[[], Any]] = {
        f"step of {name}": functools.partial(step_program, config, [device]) for name, config in step_forms()
    }
    published = narrow(shipped("published:bridge"))
    makes |= {f"policy: {name}": functools.partial(policy_program, config, device, **arguments)
              for name, config, arguments in policy_forms(published)}  # fmt: skip
    if _SMALL.value:
        makes = dict(list(makes.items())[-2:] + list(makes.items())[:1])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(makes, pool.map(run, makes), strict=True))
    failed = {name: ended for name, ended in results.items() if isinstance(ended, str)}
    return {"passed": len(results) - len(failed), "failed": failed}


def attention() -> dict[str, Any]:
    """Errors of bfloat16 against float32, over the largest value; rates as model operations a second."""
    import jax
    import jax.numpy as jnp

    from mimic_video.models.attention import attention as attend
    from mimic_video.models.attention import chosen

    def normal(seed: int, *shape: int) -> Any:
        return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)

    def all_of(backend: str, dtype: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        @jax.jit
        def compute(*heads: Any) -> Any:
            out, pullback = jax.vjp(lambda *heads: attend(*heads, mask, backend), *heads)
            return [out, *pullback(jnp.cos(out.astype(jnp.float32)).astype(out.dtype))]

        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return [x.astype(jnp.float32) for x in compute(*(x.astype(dtype) for x in (q, k, v)))]

    flash = chosen(normal(0, 1, 128, 2, 128), normal(0, 1, 128, 2, 128), "auto")
    errors: dict[str, Any] = {}
    for name, samples, queries, keys, masked in (
        ("even", 2, 512, 1024, False), ("odd", 2, 61, 1001, False), ("four draws", 8, 61, 1024, False),
        ("masked", 2, 512, 1024, True), ("masked, odd", 4, 17, 1001, True),
    ):  # fmt: skip
        q, k, v = normal(1, samples, queries, 4, 128), normal(2, 2, keys, 4, 128), normal(3, 2, keys, 4, 128)
        mask = jax.random.bernoulli(jax.random.key(4), 0.6, (2, keys)) if masked else None
        exact = all_of("xla", jnp.float32, q, k, v, mask)
        errors[name] = {backend: [round(float(jnp.abs(one - other).max() / jnp.abs(other).max()), 5) for one, other in
                                  zip(all_of(backend, jnp.bfloat16, q, k, v, mask), exact, strict=True)]
                        for backend in (flash, "xla")}  # fmt: skip

    def seconds(function: Callable, *arguments: Any) -> float:
        compiled = jax.jit(function).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        start = time.perf_counter()
        for _ in range(3):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / 3

    tokens, heads = (256, 2) if _SMALL.value else (19_200, 16)
    q, k, v = (normal(seed, 1, tokens, heads, 128) for seed in range(3))
    half = jnp.arange(tokens)[None] % 2 == 0
    rates = {}
    forms = ((flash, flash, None), (f"{flash}, half of the keys", flash, half), ("xla, in parts", "xla", None))
    for name, backend, mask in forms:

        def loss(q: Any, k: Any, v: Any, backend: Any = backend, mask: Any = mask) -> Any:
            return jnp.sum(attend(q, k, v, mask, backend).astype(jnp.float32))

        work = 4 * tokens * (tokens if mask is None else tokens // 2) * heads * 128
        forward = seconds(functools.partial(attend, mask=mask, backend=backend), q, k, v)
        both = seconds(jax.grad(loss, (0, 1, 2)), q, k, v)
        rates[name] = {"forward_ms": round(forward * 1e3, 2), "forward_tflops": round(work / forward / 1e12, 1),
                       "with_backward_ms": round(both * 1e3, 2),
                       "with_backward_tflops": round(3.5 * work / both / 1e12, 1)}  # fmt: skip
    memory = jax.devices()[0].memory_stats() or {}
    return {"backend": flash, "errors_of_output_and_gradients": errors, "tokens": tokens, "rates": rates,
            "peak_bytes": memory.get("peak_bytes_in_use")}  # fmt: skip


def precision() -> dict[str, Any]:
    """How far chunks are from those in float32, over the standard deviation of these."""
    import jax
    import numpy as np
    from benchmark_policy import random_policy

    config = shipped("published:bridge")
    data = dataclasses.replace(config.data, image_size=(240, 320))
    config = narrow(config) if _SMALL.value else dataclasses.replace(config, data=data)
    chunks = {}
    for name, changes in (("float32", {"precision": "float32"}), ("bfloat16", {}),
                          ("int8", {"policy": dataclasses.replace(config.policy, weights="int8")})):  # fmt: skip
        policy = random_policy(dataclasses.replace(config, **changes))
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (2, config.data.past_frames, *config.data.frame_size, 3), np.uint8)
        with jax.default_matmul_precision("highest" if name == "float32" else "default"):
            chunks[name] = policy(images, np.zeros((2, config.decoder.proprio_dim), np.float32), [""] * 2)
        del policy
    exact = chunks.pop("float32")
    return {name: {"rms_over_std": round(float(np.sqrt(np.mean((chunk - exact) ** 2)) / exact.std()), 5),
                   "max_over_std": round(float(np.abs(chunk - exact).max() / exact.std()), 5)}
            for name, chunk in chunks.items()}  # fmt: skip


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def golden() -> dict[str, Any]:
    """What pytest says last; products in float32 rather than in TF32, which GPUs have by default."""
    platform = "cpu" if _SMALL.value else "cuda"
    ended = _command("-m", "pytest", "-q", "tests/test_golden.py", JAX_PLATFORMS=platform, JAX_DEFAULT_MATMUL_PRECISION="highest")
    return {"exit_code": ended.returncode, "said": ended.stdout.strip().splitlines()[-8:]}


def _benchmark(*arguments: str) -> dict[str, Any]:
    ended = _command("launch/benchmark.py", *arguments)
    if ended.returncode:
        return {"error": ended.stderr.strip()[-1500:]}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def policy() -> dict[str, Any]:
    size = "small" if _SMALL.value else "2b"
    settings = [("64x64", "1")] if _SMALL.value else [("480x640", "1"), ("240x320", "1"), ("480x640", "8")]
    results = {}
    for image, batch in settings:
        reference = ("--reference=torch",) if (image, batch) != ("480x640", "8") and importlib.util.find_spec("diffusers") else ()
        results[f"{image}, batch {batch}"] = result = _benchmark(
            "policy", f"--size={size}", f"--image={image}", f"--batch={batch}", "--repeats=10", *reference)
        print(json.dumps({"part": "policy", "image": image, "batch": batch, **result}), flush=True)
    return {"settings": list(results)}


def training() -> dict[str, Any]:
    return _benchmark("training", f"--size={'small' if _SMALL.value else '2b'}", "--repeats=5")


def profile() -> dict[str, Any]:
    """Of every kernel's name, up to numbers, the share of all kernels' time."""
    import benchmark
    import jax
    from benchmark_policy import random_policy

    from mimic_video.training.sharding import global_batch, make_mesh
    from mimic_video.training.steps import abstract_state, make_train_step
    from mimic_video.vam import VideoActionModel

    results = {}
    config = shipped("published:bridge")
    config = narrow(config) if _SMALL.value else config
    results["policy"] = _kernels(functools.partial(random_policy(config), *_nothing(config)))
    config = shipped("published:cosmos")
    config = narrow(config) if _SMALL.value else benchmark.one_sample_a_device(config)
    vam, mesh = VideoActionModel(config), make_mesh(config.mesh)
    state, frozen = benchmark.random_params(config, mesh)
    batch = global_batch(benchmark.random_batch(config), mesh)
    step = make_train_step(vam, mesh, abstract_state(vam, mesh))

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    results["full step"] = _kernels(call)
    return results | {"device": jax.devices()[0].device_kind}


def _nothing(config: Any) -> tuple[Any, Any, list[str]]:
    import numpy as np

    images = np.zeros((1, config.data.past_frames, *config.data.frame_size, 3), np.uint8)
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
    streams = {(event["pid"], event["tid"]) for event in events if event.get("name") == "thread_name" and event["pid"] in devices
               and event["args"]["name"].startswith("Stream")}  # fmt: skip
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            times[event["name"].rstrip("0123456789_")] += event["dur"]
    total = sum(times.values())
    return {"wall_ms": round(wall * 1e3, 2), "kernels_ms": round(total / 1e3, 2),
            "top": [[name, round(each / 1e3, 2), round(each / total, 3)] for name, each in times.most_common(12)]}  # fmt: skip


def device() -> dict[str, Any]:
    """The machine, and its rates."""
    import benchmark
    import jax
    import jax.numpy as jnp

    size = 2**20 if _SMALL.value else 2**31
    x, add, times = jnp.zeros(size, jnp.int8), jax.jit(lambda x: x + 1), []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    chip = jax.devices()[0]
    return {"device": chip.device_kind, "capability": getattr(chip, "compute_capability", None), "jax": jax.__version__,
            "commit": commit, "python": sys.version.split()[0], "copy_gb_per_s": round(2 * size / min(times) / 1e9),
            "product_tflops": round(benchmark.product_rate("bfloat16") / 1e12, 1)}  # fmt: skip


FUNCTIONS = {part.__name__: part for part in (device, forms, attention, precision, golden, policy, training, profile)}


def run_part(part: str, seconds: float) -> list[str]:
    """The lines of a part in a process of its own, and what it said last if it failed."""
    flag = ["--small"] if _SMALL.value else []
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, __file__, f"--part={part}", *flag], cwd=ROOT, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True)  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
        errors.seek(0)
        said = errors.read()
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if process.returncode:
        late = f"stopped after {seconds:.0f} s" if process.returncode == -signal.SIGKILL else f"exit code {process.returncode}"
        lines.append(json.dumps({"part": part, "error": late, "said": said[-1500:]}))
    return [*lines, json.dumps({"part": part, "seconds": round(time.perf_counter() - start, 1)})]


def main(_: list[str]) -> None:
    if _PART.value:
        print(json.dumps({"part": _PART.value, **FUNCTIONS[_PART.value]()}), flush=True)
        return
    if unknown := set(_PARTS.value) - PARTS.keys():
        sys.exit(f"error: --parts has {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    end = time.monotonic() + _SECONDS.value
    for part in _PARTS.value:
        if (left := end - time.monotonic()) < 15:
            lines = [json.dumps({"part": part, "error": f"not run: {left:.0f} s are left of --seconds={_SECONDS.value}"})]
        else:
            lines = run_part(part, min(PARTS[part], left))
        for line in lines:
            print(line, flush=True)
            if _OUT.value:
                with open(_OUT.value, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    app.run(main)
