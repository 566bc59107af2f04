import pytest
import tiny

from mimic_video.stages import batch_shapes


@pytest.mark.parametrize("stage", ["video", "action"])
def test_batches_have_the_shapes_of_the_loader(stage):
    config = tiny.experiment(stage=stage)
    wanted = {name: (value.shape, value.dtype) for name, value in tiny.batch(config, config.train.batch_size).items()}
    if stage == "video":
        wanted = {name: wanted[name] for name in ("video", "video_mask", "text")}
    assert {name: (each.shape, each.dtype) for name, each in batch_shapes(config).items()} == wanted


def test_batches_of_latents_views_and_robots():
    data = {"latents": "there", "cameras": ("primary", "wrist")}
    config = tiny.experiment(
        precision="bfloat16", backbone_run="there", data=data, backbone={"views": 2}, decoder={"embodiments": 3}
    )
    shapes = batch_shapes(config)
    assert "video" not in shapes and shapes["latents"].shape == (8, 3, 4, 4, 16) and shapes["latents"].dtype == "bfloat16"
    assert shapes["view_mask"].shape == (8, 2) and shapes["embodiment"].shape == (8,)
