"""Compiles an experiment's training step for a TPU topology, on a machine that has none, and says whether and how it would run.

    launch/setup.sh compile
    python launch/compile.py --config=configs/pretrain.py:video_v5e --topology=v5e:16x16 [--slices=2] [--out=FILE.json]

Exit code: 0 if the step fits the chip's memory, 2 if it does not, 1 for errors. The JSON has bytes, operations and seconds of one
chip: its memory by kind; the model's FLOPs from our count, and the program's, which has what is computed again; communication by
kind; and how long a step takes at least if only arithmetic, memory traffic or communication took time.
"""

import dataclasses
import os
import pathlib
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # whatever this machine has, nothing is run on it

import experiment
from absl import flags

from mimic_video.config import ExperimentConfig
from mimic_video.training import aot, flops
from mimic_video.training.run_directory import write_json

_TOPOLOGY = flags.DEFINE_string("topology", None, "Name of the TPU topology, such as v5e:16x16 or v5p:4x4x8", required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the data centre's network", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "File for the report")
flags.FLAGS.set_default("compilation_cache", False)  # what compiling takes is reported

DOES_NOT_FIT = 2


def report(config: ExperimentConfig, topology: str, slices: int) -> dict[str, Any]:
    """What the JSON file holds."""
    devices = aot.topology_devices(topology, slices)
    chip = flops.chip_of(devices[0])
    if chip is None:
        raise aot.TopologyError(f"nothing is known of chips of the kind '{devices[0].device_kind}'")
    model = flops.step_flops(config)
    result: dict[str, Any] = {
        "topology": topology, "slices": slices, "chips": len(devices), "stage": config.stage,
        "batch_size": config.train.batch_size, "tokens_per_sample": flops.video_tokens(config),
        "mesh": dataclasses.asdict(config.mesh), "model_flops_per_chip": model.model / len(devices),
        "tokenizer_flops_per_chip": model.tokenizer / len(devices),
    }  # fmt: skip
    try:
        step = aot.compile_step(config, devices, chip)
    except aot.OutOfMemoryError as error:
        return result | {"fits": False, "hbm": {"limit": error.limit, "required": error.required}, "message": str(error)}
    bound = aot.step_bound(step.work, chip)
    return result | {
        "fits": step.memory.fits,
        "hbm": dataclasses.asdict(step.memory) | {"free_share": step.memory.free},
        "program_flops_per_chip": step.work.flops,
        "hbm_traffic_per_chip": step.work.hbm_bytes,
        "collectives_per_chip": [dataclasses.asdict(each) for each in step.work.collectives],
        "loops_of_unknown_length": step.work.unknown_loops,
        "compile_seconds": step.seconds,
        "step_bound_seconds": dataclasses.asdict(bound) | {"step": bound.seconds, "binding": bound.binding},
        "mfu_at_most": model.model / len(devices) / chip.flops / bound.seconds,
    }


def summary(values: dict[str, Any]) -> str:
    """A few lines for people."""
    hbm, place = values["hbm"], f"{values['chips']} chips of {values['topology']}"
    if "required" in hbm:
        return f"does not fit {place}: needs {_gib(hbm['required'])} of {_gib(hbm['limit'])} a chip\n{values['message']}"
    bound = values["step_bound_seconds"]
    kinds = ", ".join(f"{kind} {_gib(hbm[kind])}" for kind in ("arguments", "temporaries", "code", "unread"))
    lines = [
        f"{'fits' if values['fits'] else 'does not fit'} {place}: {_gib(hbm['peak'])} of {_gib(hbm['limit'])} a chip, "
        f"{hbm['free_share']:.0%} free ({kinds})",
        f"a step of {values['batch_size']} samples of {values['tokens_per_sample']} tokens: "
        f"{values['model_flops_per_chip'] / 1e12:.1f} TFLOP a chip of the model, "
        f"{values['program_flops_per_chip'] / 1e12:.1f} as compiled",
        *(f"{each['kind']} over {each['network']}: {each['count']} times, {_gib(each['bytes'])} a chip"
          for each in values["collectives_per_chip"]),
        f"at least {bound['step']:.3g} s, bound by {bound['binding']} (compute {bound['compute']:.3g}, hbm {bound['hbm']:.3g}, "
        f"ici {bound['ici']:.3g}, dcn {bound['dcn']:.3g} s): MFU of {values['mfu_at_most']:.0%} at most",
        f"compiled in {values['compile_seconds']:.0f} s",
    ]  # fmt: skip
    if values["loops_of_unknown_length"]:
        lines.append(f"{values['loops_of_unknown_length']} loops of unknown length are counted as if run once")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def main(config: ExperimentConfig) -> None:
    values = report(config, _TOPOLOGY.value, _SLICES.value)
    if _OUT.value:
        write_json(pathlib.Path(_OUT.value), values)
    print(summary(values), flush=True)
    if not values["fits"]:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    experiment.run(main, (aot.TopologyError,))
