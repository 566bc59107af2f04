import jax
import pytest

from mimic_video.parallel.chips import mfu


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H200": 989e12,
    }.items(),
)
def test_utilisation_is_the_share_of_all_the_devices_peak(kind, peak):
    assert mfu(peak, 2 * [Device(kind)]) == 0.5


def test_of_unknown_chips_there_is_none():
    assert mfu(1e12, jax.devices()) is None
