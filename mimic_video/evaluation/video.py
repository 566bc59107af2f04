"""Predicted against real video on held-out recordings."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mimic_video.batch import Observation
from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.offline import Window, full_batches, psnr
from mimic_video.media import film_strip, stacked, write_video
from mimic_video.models.protocols import TextEncoder
from mimic_video.models.text import make_text_encoder
from mimic_video.rerun_log import RerunLog
from mimic_video.vam import Params, VideoActionModel


def make_predictor(
    config: ExperimentConfig,
    params: Params,
    cameras: Sequence[str],
    batch_size: int = 16,
    encode_text: TextEncoder | None = None,
) -> Callable[[Sequence[Window]], UInt8[np.ndarray, "n v f h w 3"]]:
    """windows → what the backbone expects of them, whole, given their observed frames and instructions.

    Noise is a function of a window's place alone: windows that differ in one input show what that input does.

    Args:
        cameras: those of the model's that the windows have; views of the others mean nothing.
        encode_text: in place of the encoder that `config.text` describes.
    """
    vam, past = VideoActionModel(config), config.data.past_frames
    encode = encode_text or make_text_encoder(config.text, config.backbone.text_width)
    views = np.isin(config.data.cameras, cameras)
    condition, sample = jax.jit(vam.condition), jax.jit(vam.sample_video)

    def predict(windows: Sequence[Window]) -> np.ndarray:
        noise = np.asarray(vam.policy_noise(config.seed, len(windows))["video"])
        predicted = []
        for places in full_batches(len(windows), min(batch_size, len(windows))):
            group = [windows[place] for place in places]
            text = np.stack([encode(window["instruction"]) for window in group])
            observed = np.stack([window["video"][:, :past] for window in group])
            view_mask = np.tile(views, (len(group), 1)) if len(views) > 1 else None
            conditioning = condition(params, Observation(text, observed, view_mask=view_mask))
            predicted.append(np.asarray(sample(params, conditioning, noise[places])))
        return np.concatenate(predicted)[: len(windows)]

    return predict


def evaluate_video(
    config: ExperimentConfig,
    params: Params,
    windows: Sequence[Window],
    cameras: Sequence[str],
    out: pathlib.Path,
    record: int,
    log: RerunLog | None = None,
    encode_text: TextEncoder | None = None,
) -> dict[str, Any]:
    """Predictions of held-out futures, beside repeating the last observed frame.

    Args:
        windows: at least one.
        cameras: those of the model's that the windows have.
        out: gets `videos/NN.gif`, real beside predicted, of the first `record` windows, and `videos/strip.png` of the first four.
        log: gets both videos of every camera of those windows, times from the present on.
        encode_text: in place of the encoder that `config.text` describes.

    Returns:
        In dB for each future frame that some window has `psnr` and `psnr_last_frame_repeated`; and `samples`, the instructions.
    """
    past, views = config.data.past_frames, np.isin(config.data.cameras, cameras)
    real = np.stack([window["video"] for window in windows])
    predicted = make_predictor(config, params, cameras, encode_text=encode_text)(windows)
    times = np.arange(1 - past, 1 + config.data.future_frames) / config.data.video_hz
    for i in range(min(record, len(windows)) if log is not None else 0):
        assert log is not None
        for camera, one, other in zip(config.data.cameras, real[i], predicted[i], strict=True):
            if camera in cameras:
                log.images(f"window_{i}/recorded/{camera}", one, times)
                log.images(f"window_{i}/predicted/{camera}", other, times)
        log.text(f"window_{i}/instruction", windows[i]["instruction"], times[0])
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
