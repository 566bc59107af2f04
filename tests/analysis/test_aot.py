import dataclasses
import types

import numpy as np
import pytest
import tiny

from mimic_video.analysis import aot
from mimic_video.analysis.hlo import Collective, Work
from mimic_video.analysis.policy_flops import policy_flops
from mimic_video.config import ConfigError
from mimic_video.parallel.chips import CHIPS, chip_of
from mimic_video.training.flops import step_flops
from mimic_video.vam import VideoActionModel


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.97G) exceeds "
        "available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 27.97G of 15.75G hbm. "
        "Exceeded hbm capacity by 12.22G.",
    ],
)
def test_a_refusal_for_memory_has_its_numbers(message):
    error = aot.out_of_memory(message)
    assert (error.required, error.limit) == (27.97 * 2**30, 15.75 * 2**30)
    assert aot.out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel") is None


def test_memory_adds_up():
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=50,
        generated_code_size_in_bytes=7,
    )
    memory = aot.memory_of(analysis, limit=200.0, resident=103)
    assert (memory.unread, memory.peak, memory.free) == (3, 170, pytest.approx(0.15))
    assert memory.fits and not dataclasses.replace(memory, limit=169).fits


def test_the_slowest_resource_binds():
    chip = CHIPS["TPU v5 lite"]
    for field, name in (("flops", "compute"), ("hbm_bytes", "hbm")):
        bound = aot.step_bound(dataclasses.replace(Work(1.0, 1.0, (), 0), **{field: 197e12}), chip)
        assert bound.binding == name and bound.seconds == 197e12 / {"compute": chip.flops, "hbm": chip.hbm_rate}[name]
    sent = tuple(Collective("all-reduce", network, 2, 1e9) for network in ("ici", "dcn"))
    bound = aot.step_bound(Work(1.0, 1.0, sent, 0), chip)
    assert bound.ici == 1e9 / chip.link_rate and bound.binding == "dcn"


@pytest.mark.tpu_compiler
def test_a_topology_that_is_none():
    with pytest.raises(aot.TopologyError, match="topology 'v5e:3x3' is not one that libtpu knows"):
        aot.topology_devices("v5e:3x3")


@pytest.mark.tpu_compiler
def test_slices_are_told_apart():
    devices = aot.topology_devices("v5e:2x2", slices=2)
    assert len(devices) == 8 and {device.slice_index for device in devices} == {0, 1}
    assert chip_of(devices[0]) is CHIPS["TPU v5 lite"]


@pytest.mark.tpu_compiler
def test_a_mesh_that_does_not_fit_the_topology():
    devices = aot.topology_devices("v5e:2x2")
    with pytest.raises(ConfigError, match="must multiply to the 4 devices"):
        aot.step_program(tiny.experiment(mesh={"data": 3}), devices)


def small(**changes):
    """Wide enough for what TPUs do by default: heads of 128 and tokens enough for splash attention."""
    values = {
        "precision": "bfloat16",
        "text": {"rows": 128},
        "data": {"image_size": (128, 128)},
        "backbone": {"width": 256, "num_blocks": 4, "text_width": 128, "hidden_block": 3},
        "train": {"remat": "full", "batch_size": 4},
    }
    return tiny.experiment(**values | changes)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("stage", "slices"), [("video", 1), ("action", 2)])
def test_a_step_compiled_for_tpus(stage, slices):
    config = small(stage=stage, mesh={"data": slices, "fsdp": 2, "sequence": 2})
    step = aot.compile_program(*aot.step_program(config, aot.topology_devices("v5e:2x2", slices)), CHIPS["TPU v5 lite"])
    model = step_flops(VideoActionModel(config))
    assert step.memory.fits and step.memory.free > 0.9 and step.work.unknown_loops == 0
    again = 4 / 3 if stage == "video" else 1.0
    counted = (model.model + model.tokenizer) / (4 * slices)
    assert counted < step.work.flops < 2 * again * counted  # blocks again, and padding to the units' sizes
    assert {"all-gather", "all-reduce"} <= {each.kind for each in step.work.collectives}
    between = {each.kind for each in step.work.collectives if each.network == "dcn"}
    assert ("all-reduce" in between) == bool(between) == (slices > 1)
    assert np.isfinite(aot.step_bound(step.work, CHIPS["TPU v5 lite"]).seconds)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
@pytest.mark.parametrize("form", ["one chunk", "samples", "continuing", "int8", "a missing camera and two robots"])
def test_a_policy_compiled_for_one_tpu(form, topology):
    """Of 4 robots, so that three samples of 1 + 15 tokens are more queries than splash attention needs."""
    changes = {"policy": {"weights": "int8"}} if form == "int8" else {}
    if "camera" in form:
        changes = {"data": {"image_size": (128, 128), "cameras": ("primary", "wrist")}, "decoder": {"embodiments": 2}}
    backbone = {"width": 256, "num_blocks": 2, "text_width": 128, "hidden_block": 1}
    config = small(backbone=backbone, **changes)
    decoder = dataclasses.replace(config.decoder, width=256)
    config = dataclasses.replace(config, decoder=decoder, data=dataclasses.replace(config.data, action_horizon=60))
    robot = dataclasses.replace(aot.widest_robot(config), cameras=("primary",))
    arguments = {"samples": 3 if form == "samples" else None, "continuing": form == "continuing", "robot": robot}
    device = aot.topology_devices(topology)[0]
    compiled = aot.compile_program(*aot.policy_program(config, device, 4, **arguments), chip_of(device))
    assert compiled.memory.fits and compiled.work.unknown_loops == 0
    assert compiled.work.flops > 4 * policy_flops(config).total * 0.9
