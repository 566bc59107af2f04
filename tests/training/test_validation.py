"""Validation on a mesh of eight devices, against the model's own losses and samplers on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from mimic_video.batch import Observation
from mimic_video.config import MeshConfig
from mimic_video.flow import matching, solvers
from mimic_video.parallel.sharding import global_batch, make_mesh, place
from mimic_video.runs.directory import read_metrics
from mimic_video.stages import split_params
from mimic_video.training.loop import train
from mimic_video.training.validation import draw_curves, make_action_curves, make_video_curve, make_video_samples

SMALL = {"backbone": {"num_blocks": 1}, "decoder": {"num_blocks": 1}, "policy": {"video_steps": 3, "stop_step": 2}}


def spread(config, *batches):
    """(mesh, parameters split for training, batches) on data=2, fsdp=2, sequence=2."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    parts = (place(part, mesh) for part in split_params(tiny.params(config), config))
    return mesh, *parts, [global_batch(batch, mesh) for batch in batches]


@pytest.mark.training
def test_action_errors_are_those_of_the_policy_and_of_noised_true_video():
    config = tiny.experiment(**SMALL)
    vam, size = tiny.model(config), 8
    batches = [tiny.batch(config, size, seed) for seed in (0, 1)]
    scale = np.tile(np.float32([2.0, 0.5]), (size, 4, 1))
    batches = [batch._replace(action_scale=scale) for batch in batches]
    batches[0].action_mask[3, 1:] = False
    batches[0].actions[3, 1:] = 1e6  # padding
    mesh, params, frozen, placed = spread(config, *batches)
    values = make_action_curves(vam, mesh)(params, frozen, placed)
    assert len(values) == 2 * 2 * 4

    noise = vam.draw_noise(jax.random.key(config.seed), size)
    time = matching.flow_time(solvers.karras_sigmas(3)[2])  # where the policy stops

    @jax.jit
    def planned(params, batch):
        """Chunks after two steps of the video sampler, and of the true video noised to the same time."""
        times = jnp.full(size, time)
        hidden = vam.hidden_of_noised_video(params, batch, {"video_time": times, "video": noise["video"]})
        past = tiny.changed(batch, video=batch.observation.video[:, :, :5]).observation
        return {
            "generated": vam.sample_actions(params, past, noise),
            "ground_truth": vam.decode_actions(
                params, vam.action_conditioning(params, hidden, times, batch.observation), noise["actions"]
            ),
        }

    chunks = [planned(tiny.params(config), batch) for batch in batches]
    counts = np.concatenate([batch.action_mask for batch in batches])
    for video in ("generated", "ground_truth"):
        errors = np.concatenate([chunk[video] - batch.actions for chunk, batch in zip(chunks, batches, strict=True)])[counts]
        where = f"{video}_video/tau_{time:.4f}"
        np.testing.assert_allclose(values[f"validation_action_mse/{where}"], np.mean(errors**2), rtol=1e-4)
        np.testing.assert_allclose(values[f"validation_action_mse_raw/{where}"], np.mean((errors * [2.0, 0.5]) ** 2), rtol=1e-4)
    assert len({round(value, 6) for value in values.values()}) == len(values)


@pytest.mark.training
def test_video_errors_by_noise_level_and_predicted_videos():
    config = tiny.experiment(stage="video", **SMALL)
    vam, batch = tiny.model(config), tiny.batch(config, 8)
    mesh, params, frozen, (placed,) = spread(config, batch)
    values = make_video_curve(vam, mesh)(params, frozen, [placed])
    assert len(values) == 10 and len(set(values.values())) == 10
    real, predicted = make_video_samples(vam, mesh)(params, frozen, placed)
    rows = [0, 2, 4, 6]  # the first of every shard
    np.testing.assert_array_equal(real, batch.observation.video[rows])

    key, sigma = jax.random.key(config.seed), matching.video_sigma_quantiles(np.array([0.35]), config.noise)[0]

    @jax.jit
    def alone(params):
        draws = vam.draw(key, 8) | {"video_time": jnp.full(8, matching.flow_time(sigma))}
        noise = vam.draw_noise(key, 4)["video"]
        past = Observation(batch.observation.text[rows], batch.observation.video[rows, :, :5])
        return (
            vam.video_loss(params, batch, draws)[1]["video_mse"].value,
            vam.sample_video(params, vam.condition(params, past), noise),
        )

    error, video = alone(tiny.params(config))
    np.testing.assert_allclose(values[f"validation_video_mse/sigma_{sigma:.3g}"], error, rtol=1e-4)
    assert np.abs(np.int16(predicted) - np.int16(video)).max() <= 1


@pytest.mark.training
def test_a_resumed_run_writes_all_of_it(tmp_path):
    settings = {"log_every": 2, "validate_every": 3, "validation_curves": True}
    config = tiny.experiment(stage="video", train=settings, **SMALL)

    def batches(start):
        """The third is broken at the first attempt."""
        for step in range(start, 4):
            if step == 2 and not start:
                raise OSError("unplugged")
            yield tiny.batch(config, 8, step)

    def start():
        train(config, tmp_path, tiny.Data(config, batches, (tiny.batch(config, 8, 9),)), (4, 4))

    with pytest.raises(OSError, match="unplugged"):
        start()
    start()
    first, second, third = read_metrics(tmp_path)
    assert [record["step"] for record in (first, second, third)] == [2, 3, 4]
    assert 0 < first["goodput"] < 1 and 0 < third["goodput"] < 1
    assert third["step_seconds"] > first["step_seconds"] == second["step_seconds"]  # step 3 compiled
    assert first["grad_norm/backbone/blocks/mlp"] > 0 and first["param_norm/backbone/final"] > 0
    assert "samples_per_second" in third and "samples_per_second" not in second
    assert second["validation_video_mse"] > 0 and sum("/sigma_" in name for name in second) == 10
    with Image.open(tmp_path / "samples" / "3.gif") as video:
        assert video.n_frames == 9
    assert (tmp_path / "samples" / "4.gif").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"validation_videos" in events and b"/sigma_" in events


def test_curves_as_a_picture():
    names = [
        f"validation_action_mse{raw}/{video}_video/tau_{time}"
        for raw in ("", "_raw")
        for video in ("generated", "ground_truth")
        for time in (0.1, 0.9)
    ]
    picture = draw_curves({name: float(number) for number, name in enumerate(names)})
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
