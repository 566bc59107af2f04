"""What accelerator chips can do at best, and the share of it that a program uses."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one accelerator chip can do at best.

    Attributes:
        flops: bfloat16 operations of its matrix units per second.
        hbm: bytes of its memory that programs can use.
        hbm_rate: bytes per second between memory and chip.
        link_rate: bytes per second that it sends to other chips over all of its links, and as many that it receives.
    """

    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float


# By what JAX's `device_kind` contains; the first match counts. From Google's pages on each TPU version ("System architecture",
# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) and NVIDIA's data sheets of the A100, H100 and H200 (SXM, without sparsity). The
# memory of TPUs is what their compiler leaves to programs, which its errors state.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.2e12, 300e9),
    "TPU v5 lite": Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 31.25 * 2**30, 1638e9, 400e9),
    "A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip behind a device; None for kinds that `CHIPS` lacks, and for CPUs."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind), None)


def mfu(flops_per_second: float, devices: list[jax.Device]) -> float | None:
    """Model FLOPs utilisation: the share of all the devices' peak that `flops_per_second` is; None where that is not known."""
    chip = chip_of(devices[0])
    return None if chip is None else flops_per_second / (chip.flops * len(devices))
