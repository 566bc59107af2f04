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

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import experiment
import jax
from absl import flags
from shipped import all_shipped, shipped

from mimic_video.analysis import gpu_report
from mimic_video.analysis.forms import narrow
from mimic_video.analysis.training_benchmark import one_sample_a_device
from mimic_video.config import ConfigError

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
_PART: flags.FlagHolder[Any] = flags.DEFINE_enum("part", None, list(PARTS), "Runs one part in this process")
_SHARD = flags.DEFINE_string("shard", None, "i/n: of `forms`, the i-th of n equal parts, counted from 0")
_SECONDS = flags.DEFINE_integer("seconds", sum(PARTS.values()), "For all parts together", lower_bound=1)
_SMALL = flags.DEFINE_bool("small", False, "Sizes for machines without a GPU")
_OUT = flags.DEFINE_string("out", None, "File that the lines are appended to")


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def _own(part: str) -> list[str]:
    """The command of one part."""
    return [sys.executable, __file__, f"--part={part}", *(["--small"] if _SMALL.value else [])]


def golden() -> dict[str, Any]:
    """What pytest says last; products in float32 rather than in TF32, which GPUs have by default."""
    platform = "cpu" if _SMALL.value else "cuda"
    ended = _command("-m", "pytest", "-q", "tests/test_golden.py", JAX_PLATFORMS=platform, JAX_DEFAULT_MATMUL_PRECISION="highest")
    return {"exit_code": ended.returncode, "said": ended.stdout.strip().splitlines()[-8:]}


def policy() -> dict[str, Any]:
    settings = [("64x64", "1")] if _SMALL.value else [("480x640", "1"), ("240x320", "1"), ("480x640", "8")]
    for image, batch in settings:
        compared = batch == "1" and importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch")
        arguments = [f"--model={'small' if _SMALL.value else '2b'}", f"--image_size={image}", f"--batch_size={batch}"]
        reference = ["--reference=torch"] if compared else []
        ended = _command("launch/benchmark.py", "policy", *arguments, "--repeats=10", *reference)
        failed = {"image_size": image, "batch": batch, "error": ended.stderr.strip()[-1500:]}
        gpu_report.emit("policy", **(failed if ended.returncode else json.loads(ended.stdout.splitlines()[-1])))
    return {"measured": [f"{image}, batch {batch}" for image, batch in settings]}


def precision() -> dict[str, Any]:
    config = shipped("quickstart:action" if _SMALL.value else "published:bridge")
    if not _SMALL.value:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=(240, 320)))
    return gpu_report.precision(config)


def training() -> dict[str, Any]:
    config = one_sample_a_device(shipped("published:cosmos"))
    return gpu_report.training(narrow(config) if _SMALL.value else config)


def profile() -> dict[str, Any]:
    bridge, cosmos = shipped("published:bridge"), shipped("published:cosmos")
    if _SMALL.value:
        return gpu_report.profile(narrow(bridge), narrow(cosmos))
    return gpu_report.profile(bridge, one_sample_a_device(cosmos))


FUNCTIONS = {
    "device": lambda: gpu_report.device(_SMALL.value),
    "attention": lambda: gpu_report.attention(_SMALL.value),
    "forms": lambda: gpu_report.run_forms(_own("forms"), _SMALL.value),
    "training": training,
    "policy": policy,
    "golden": golden,
    "precision": precision,
    "profile": profile,
}


def one_part() -> None:
    """Runs --part, or a --shard of the forms, in this process."""
    if _SHARD.value:
        number, of = map(int, _SHARD.value.split("/"))
        gpu_report.emit("forms", **gpu_report.share_of_forms(all_shipped(), number, of, _SMALL.value))
        return
    # `golden`, `policy` and the shards of `forms` start JAX in processes of their own, beside which this one takes no memory.
    if not _SMALL.value and jax.default_backend() != "gpu":
        raise ConfigError("JAX finds no GPU here; --small shows on a CPU that the report runs")
    gpu_report.emit(_PART.value, **FUNCTIONS[_PART.value]())


def main() -> None:
    if _PART.value or _SHARD.value:
        one_part()
        return
    if unknown := set(_PARTS.value) - PARTS.keys():
        raise ConfigError(f"--parts has {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    end, failed = time.monotonic() + _SECONDS.value, False
    for part in _PARTS.value:
        left = end - time.monotonic()
        seconds = left if _SMALL.value else min(PARTS[part], left)  # what a GPU takes says nothing of a CPU
        no_time = [json.dumps({"part": part, "error": "no time"})]
        for line in gpu_report.run_part(part, _own(part), ROOT, seconds) if seconds > 0 else no_time:
            print(line, flush=True)
            if _OUT.value:
                with open(_OUT.value, "a") as file:
                    file.write(line + "\n")
            found = json.loads(line)
            failed |= bool("error" in found or found.get("failed") or found.get("exit_code"))
    sys.exit(failed)


if __name__ == "__main__":
    experiment.run(main, config=False, compilation_cache=None)
