"""launch/train.py on weights that were converted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from data_pipelines.writers import write_rlds
from mimic_video.training import checkpoints

SETTINGS = {"precision": "bfloat16", "train": {"steps": 2, "ema_decay": 0.0}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run directory of bfloat16 weights of stage `video`, and those weights."""
    config = tiny.experiment(stage="video", **SETTINGS)
    params = tiny.params(config, seed=3)
    params = {
        "tokenizer": params["tokenizer"],
        "backbone": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["backbone"]),
    }
    run = tmp_path_factory.mktemp("converted") / "run"
    checkpoints.save_converted(run, config, params)
    return run, params


@pytest.mark.parametrize("stage", ["video", "action"])
def test_either_stage_starts_from_converted_weights(launch, config_file, pretrained, tmp_path, stage):
    run, params = pretrained
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)]}
    data = str(write_rlds(tmp_path, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    datasets = {"video_dataset": data, "action_dataset": data}
    file = config_file(tiny.experiment(stage=stage, backbone_run=str(run), data=datasets, **SETTINGS))
    workdir = tmp_path / "out"
    assert f"backbone: step 0 of {run}" in launch("train", f"--config={file}", f"--workdir={workdir}")
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    trained, step = checkpoints.load_params(workdir, "stored")
    assert step == 2
    for expected, found in zip(jax.tree.leaves(params["tokenizer"]), jax.tree.leaves(trained["tokenizer"]), strict=True):
        np.testing.assert_array_equal(np.float32(found), np.float32(expected))
    moved = [np.abs(np.float32(found) - np.float32(expected)).max()
             for expected, found in zip(jax.tree.leaves(params["backbone"]), jax.tree.leaves(trained["backbone"]), strict=True)]
    if stage == "video":  # small steps from where the weights were, in float32
        assert 0 < max(moved) < 0.01 and jax.tree.leaves(trained["backbone"])[0].dtype == jnp.float32
    else:  # frozen, and still in bfloat16
        assert max(moved) == 0 and jax.tree.leaves(trained["backbone"])[0].dtype == jnp.bfloat16
