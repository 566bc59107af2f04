"""What the loader makes, and what the model is compiled for, are one description. Refusals are in test_vam.py."""

import jax
import pytest
import tiny

from mimic_video.batch import batch_shapes, fields, make_batch


@pytest.mark.parametrize("stage", ["video", "action"])
def test_batches_have_the_shapes_of_the_loader(stage):
    config = tiny.experiment(stage=stage)
    shapes = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), tiny.batch(config, 8))
    assert batch_shapes(config, 8) == shapes


def test_batches_of_latents_views_and_robots():
    data = {"latents": "there", "cameras": ("primary", "wrist")}
    config = tiny.experiment(precision="bfloat16", backbone_run="there", data=data, decoder={"embodiments": 3})
    seen = batch_shapes(config, 8).observation
    assert seen.video is None and seen.latents.shape == (8, 2, 3, 2, 4, 16) and seen.latents.dtype == "bfloat16"
    assert seen.view_mask.shape == (8, 2) and seen.embodiment.shape == (8,)


def test_fields_make_the_batch_they_are_of():
    batch = tiny.batch(tiny.experiment(), 2)
    assert make_batch(fields(batch)) is not batch and fields(make_batch(fields(batch))) == fields(batch)
