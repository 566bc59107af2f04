"""Predicted against real video on held-out recordings."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from mimic_video.batch import Observation
from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.offline import Window, psnr
from mimic_video.media import film_strip, stacked, write_video
from mimic_video.models.text import make_text_encoder
from mimic_video.vam import Params, VideoActionModel


def evaluate_video(
    config: ExperimentConfig, params: Params, windows: Sequence[Window], cameras: Sequence[str], out: pathlib.Path, record: int
) -> dict[str, Any]:
    """Predictions of held-out futures, beside repeating the last observed frame.

    Args:
        windows: at least one.
        cameras: those of the model's that the windows have.
        out: gets `videos/NN.gif`, real beside predicted, of the first `record` windows, and `videos/strip.png` of the first four.

    Returns:
        In dB for each future frame that some window has `psnr` and `psnr_last_frame_repeated`; and `samples`, the instructions.
    """
    vam, past = VideoActionModel(config), config.data.past_frames
    real = np.stack([window["video"] for window in windows])
    encode_text = make_text_encoder(config.text, config.backbone.text_width)
    text = np.stack([encode_text(window["instruction"]) for window in windows])
    noise = vam.policy_noise(config.seed, len(windows))["video"]
    views = np.isin(config.data.cameras, cameras)
    view_mask = np.tile(views, (len(windows), 1)) if len(views) > 1 else None
    conditioning = jax.jit(vam.condition)(params, Observation(text, real[:, :, :past], view_mask=view_mask))
    predicted = np.asarray(jax.jit(vam.sample_video)(params, conditioning, noise))
    real, predicted = stacked(real[:, views]), stacked(predicted[:, views])
    mask = np.stack([window["frame_mask"] for window in windows])[:, past:]
    repeated = np.repeat(real[:, past - 1 : past], config.data.future_frames, axis=1)
    for i in range(min(record, len(windows))):
        write_video(out / "videos" / f"{i:02d}.gif", np.concatenate([real[i], predicted[i]], axis=2), config.data.video_hz / 2)
    strip = Image.fromarray(film_strip(real[:4, past - 1 :: 3], predicted[:4, past - 1 :: 3]))
    (out / "videos").mkdir(exist_ok=True)
    strip.resize((strip.width * 2, strip.height * 2), Image.Resampling.NEAREST).save(out / "videos" / "strip.png")
    return {
        "psnr": psnr(predicted[:, past:], real[:, past:], mask).tolist(),
        "psnr_last_frame_repeated": psnr(repeated, real[:, past:], mask).tolist(),
        "samples": [window["instruction"] for window in windows],
    }
