"""How a training step or a policy would run on chips that this machine does not have: numbers for JSON, and lines for people."""

import contextlib
import dataclasses
from typing import Any

import jax

from mimic_video.analysis import aot
from mimic_video.analysis.policy_flops import policy_flops
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.parallel.chips import chip_of
from mimic_video.training.flops import step_flops, video_tokens
from mimic_video.vam import VideoActionModel


def _program(config: ExperimentConfig, devices: list[jax.Device], robots: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(function, shapes of its arguments, what the report says of it)."""
    vam = VideoActionModel(config)
    tokens = video_tokens(vam)
    if robots:
        needed = policy_flops(config)
        return *aot.policy_program(config, devices[0], robots), {
            "program": "policy",
            "batch_size": robots,
            "tokens_per_sample": tokens,
            "model_flops_per_chip": robots * (needed.total - needed.encode),
            "tokenizer_flops_per_chip": robots * needed.encode,
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


def tpu_report(config: ExperimentConfig, topology: str, slices: int, robots: int) -> dict[str, Any]:
    """The report of a program for TPUs: the step or, for some `robots`, the policy on one chip.

    Raises:
        TopologyError: for a topology that is not known.
    """
    devices = aot.topology_devices(topology, slices)
    if robots:
        devices = devices[:1]
    chip = chip_of(devices[0])
    if chip is None:
        raise aot.TopologyError(f"nothing is known of chips of the kind '{devices[0].device_kind}'")
    function, arguments, described = _program(config, devices, robots)
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


def gpu_report(config: ExperimentConfig, devices: int, capability: str, robots: int) -> dict[str, Any]:
    """The report of a program for GPUs: the step or, for some `robots`, the policy on one."""
    try:
        major, minor = map(int, capability.split("."))
    except ValueError as error:
        raise ConfigError(f"--capability={capability} is no compute capability; expected one like 9.0") from error
    with contextlib.suppress(RuntimeError):  # where JAX has begun, it has the devices that it has
        jax.config.update("jax_num_cpu_devices", devices)  # which stand for GPUs
    function, arguments, described = _program(config, jax.devices()[: 1 if robots else devices], robots)
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
