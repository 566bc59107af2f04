"""Compiles an experiment's training step, or its policy, for chips that this machine does not have, and says how it would run.

    launch/setup.sh compile
    python launch/compile.py --config=configs/pretrain.py:video_v5e --topology=v5e:16x16 [--slices=2] [--out=FILE.json]
    python launch/compile.py --config=configs/published.py:bridge --topology=v6e:1x1 --policy=1
    python launch/compile.py --config=configs/small.py:half_video --platform=cuda [--devices=8] [--capability=9.0] [--policy=1]

For a TPU the whole program is compiled. Exit code: 0 if it fits the chip's memory, 2 if it does not, 1 for errors. The JSON has
bytes, operations and seconds of one chip: its memory by kind; the model's FLOPs as traced, and the program's, which has what
is computed again; communication by kind; and how long a step takes at least if only arithmetic, memory traffic or communication
took time.

For a GPU the program is lowered: what cuDNN's attention cannot do is found, and the JSON has the memory of arguments, the largest
arrays, the model's FLOPs, and which attention was chosen. Compiling it takes a GPU, so what it needs in all is not known.
"""

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

import experiment
import jax
from absl import flags

from mimic_video.analysis import aot
from mimic_video.analysis.policy_flops import policy_flops
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.parallel.chips import chip_of
from mimic_video.runs.directory import write_json
from mimic_video.training.flops import step_flops, video_tokens
from mimic_video.vam import VideoActionModel

_PLATFORM = flags.DEFINE_enum("platform", "tpu", ["tpu", "cuda"], "What is compiled for")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Name of the TPU topology, such as v5e:16x16 or v5p:4x4x8")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the data centre's network", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", 1, "GPUs that the step is spread over", lower_bound=1)
_CAPABILITY = flags.DEFINE_string("capability", "9.0", "Compute capability of the GPUs: 9.0 of an H100, 8.0 of an A100")
_POLICY = flags.DEFINE_integer(
    "policy", 0, "Compiles the policy for that many robots, on one chip, in place of the step", lower_bound=0
)
_OUT = flags.DEFINE_string("out", None, "File for the report")
flags.FLAGS.set_default("compilation_cache", False)  # what compiling takes is reported

DOES_NOT_FIT = 2


def program(config: ExperimentConfig, devices: list[jax.Device]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(function, shapes of its arguments, what the report says of it)."""
    vam = VideoActionModel(config)
    tokens = video_tokens(vam)
    if _POLICY.value:
        needed = policy_flops(config)
        return *aot.policy_program(config, devices[0], _POLICY.value), {
            "program": "policy",
            "batch_size": _POLICY.value,
            "tokens_per_sample": tokens,
            "model_flops_per_chip": _POLICY.value * (needed.total - needed.encode),
            "tokenizer_flops_per_chip": _POLICY.value * needed.encode,
        }
    model = step_flops(vam)
    return *aot.step_program(config, devices), {
        "program": "step",
        "stage": config.stage,
        "batch_size": config.train.batch_size,
        "tokens_per_sample": tokens,
        "mesh": dataclasses.asdict(config.mesh),
        "model_flops_per_chip": model.model / len(devices),
        "tokenizer_flops_per_chip": model.tokenizer / len(devices),
    }


def tpu_report(config: ExperimentConfig, topology: str, slices: int) -> dict[str, Any]:
    """What the JSON file holds of a program for TPUs."""
    devices = aot.topology_devices(topology, slices)
    if _POLICY.value:
        devices = devices[:1]
    chip = chip_of(devices[0])
    if chip is None:
        raise aot.TopologyError(f"nothing is known of chips of the kind '{devices[0].device_kind}'")
    function, arguments, described = program(config, devices)
    result: dict[str, Any] = {"topology": topology, "slices": slices, "chips": len(devices), **described}
    try:
        compiled = aot.compile_program(function, arguments, chip)
    except aot.OutOfMemoryError as error:
        return result | {"fits": False, "hbm": {"limit": error.limit, "required": error.required}, "message": str(error)}
    bound = aot.step_bound(compiled.work, chip)
    return result | {
        "fits": compiled.memory.fits,
        "hbm": dataclasses.asdict(compiled.memory) | {"free_share": compiled.memory.free},
        "program_flops_per_chip": compiled.work.flops,
        "hbm_traffic_per_chip": compiled.work.hbm_bytes,
        "collectives_per_chip": [dataclasses.asdict(each) for each in compiled.work.collectives],
        "loops_of_unknown_length": compiled.work.unknown_loops,
        "compile_seconds": compiled.seconds,
        "step_bound_seconds": dataclasses.asdict(bound) | {"step": bound.seconds, "binding": bound.binding},
        "mfu_at_most": result["model_flops_per_chip"] / chip.flops / bound.seconds,
    }


def gpu_report(config: ExperimentConfig, devices: int, capability: str) -> dict[str, Any]:
    """What the JSON file holds of a program for GPUs."""
    try:
        major, minor = map(int, capability.split("."))
    except ValueError as error:
        raise ConfigError(f"--capability={capability} is no compute capability; expected one like 9.0") from error
    with contextlib.suppress(RuntimeError):  # where JAX has begun, it has the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)  # which stand for GPUs
    function, arguments, described = program(config, jax.devices()[: 1 if _POLICY.value else devices])
    lowered = aot.lower_for_gpu(function, arguments, (major, minor))
    largest = [dict(zip(("bytes", "array", "operation"), each, strict=True)) for each in lowered.largest]
    return {
        "platform": "cuda",
        "capability": capability,
        "chips": function.mesh.size,
        **described,
        "argument_bytes_per_chip": lowered.arguments,
        "largest_arrays": largest,
        "attention": {"cudnn": lowered.flash, "by_xla": lowered.refused},
    }


def gpu_summary(values: dict[str, Any]) -> str:
    """A few lines for people."""
    cudnn, by_xla = values["attention"]["cudnn"], values["attention"]["by_xla"]
    largest = ", ".join(f"{each['array']} {_gib(each['bytes'])}" for each in values["largest_arrays"][:3])
    return "\n".join(
        [
            f"lowers for {values['chips']} GPU{'s' * (values['chips'] > 1)} of compute capability {values['capability']}",
            _what(values),
            f"arguments of {_gib(values['argument_bytes_per_chip'])} a GPU; largest arrays, before they are spread: {largest}",
            f"attention by cuDNN: {cudnn['forward']} calls forward and {cudnn['backward']} backward in the program's text",
            *(f"attention by XLA: {reason}" for reason in by_xla),
        ]
    )


def _what(values: dict[str, Any]) -> str:
    """The program, and its work."""
    kind = "a step of {} samples" if values["program"] == "step" else "a policy's plan for {} robots"
    return (
        f"{kind.format(values['batch_size'])} of {values['tokens_per_sample']} tokens: "
        f"{values['model_flops_per_chip'] / 1e12:.1f} TFLOP a chip of the model"
    )


def tpu_summary(values: dict[str, Any]) -> str:
    """A few lines for people."""
    hbm, place = values["hbm"], f"{values['chips']} chips of {values['topology']}"
    if "required" in hbm:
        return f"does not fit {place}: needs {_gib(hbm['required'])} of {_gib(hbm['limit'])} a chip\n{values['message']}"
    bound = values["step_bound_seconds"]
    kinds = ", ".join(f"{kind} {_gib(hbm[kind])}" for kind in ("arguments", "temporaries", "code", "unread"))
    lines = [
        f"{'fits' if values['fits'] else 'does not fit'} {place}: {_gib(hbm['peak'])} of {_gib(hbm['limit'])} a chip, "
        f"{hbm['free_share']:.0%} free ({kinds})",
        f"{_what(values)}, {values['program_flops_per_chip'] / 1e12:.1f} as compiled",
        *(
            f"{each['kind']} over {each['network']}: {each['count']} times, {_gib(each['bytes'])} a chip"
            for each in values["collectives_per_chip"]
        ),
        f"at least {bound['step']:.3g} s, bound by {bound['binding']} (compute {bound['compute']:.3g}, hbm {bound['hbm']:.3g}, "
        f"ici {bound['ici']:.3g}, dcn {bound['dcn']:.3g} s): MFU of {values['mfu_at_most']:.0%} at most",
        f"compiled in {values['compile_seconds']:.0f} s",
    ]
    if values["loops_of_unknown_length"]:
        lines.append(f"{values['loops_of_unknown_length']} loops of unknown length are counted as if run once")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def main(config: ExperimentConfig) -> None:
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has, nothing is run on it
    other = ("topology", "slices") if _PLATFORM.value == "cuda" else ("devices", "capability")
    for name in (*other, *(["devices"] if _POLICY.value else [])):
        if flags.FLAGS[name].present:
            raise ConfigError(
                f"--{name} is given, which says nothing for --platform={_PLATFORM.value}"
                f"{' --policy, which is for one chip' if name not in other else ''}"
            )
    if _PLATFORM.value == "cuda":
        values = gpu_report(config, _DEVICES.value, _CAPABILITY.value)
    elif _TOPOLOGY.value:
        values = tpu_report(config, _TOPOLOGY.value, _SLICES.value)
    else:
        raise ConfigError("--topology is missing: the TPU to compile for, such as v5e:16x16, or --platform=cuda for GPUs")
    if _OUT.value:
        write_json(pathlib.Path(_OUT.value), values)
    print((gpu_summary if _PLATFORM.value == "cuda" else tpu_summary)(values), flush=True)
    if not values.get("fits", True):
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    experiment.run(main, (aot.TopologyError,))
