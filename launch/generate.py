"""Generates the video that a backbone expects to follow one picture, or the last frames of a video.

    python launch/generate.py --config=configs/published.py:cosmos --workdir=runs/cosmos \\
        --input=kitchen.png --prompt='The robot arm puts the carrot on the plate.' --out=kitchen.mp4

`--workdir` is a run of either stage. The window's settings are free: `--config.data.image_size='(240, 320)'` for another size,
`--config.data.future_frames=28` for another length, `--config.policy.video_steps=10` for fewer solver steps, `--config.seed=1`
for another sample. Input of another aspect ratio is cropped. Frames are at the rate that the backbone was trained at. A model of
several cameras takes an --input of each, in the order of `data.cameras`; the last ones may be left out.
"""

import dataclasses

import experiment
import jax
import numpy as np
from absl import flags

from mimic_video.batch import Observation
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.media import MediaError, check_writable, crop_to_shape, read_frames, stacked, write_video
from mimic_video.models.text import make_text_encoder
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, run_path
from mimic_video.transforms import resize_images, stack_views
from mimic_video.vam import VideoActionModel

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, of training or of converted weights", required=True)
_INPUT = flags.DEFINE_multi_string("input", None, "Picture or video that is continued", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "What happens in the video")
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What the video is guided away from, with a --guidance")
_GUIDANCE = flags.DEFINE_float("guidance", 0.0, "Strength of classifier-free guidance; 0 is none and takes half the time", 0.0)
_OUT = flags.DEFINE_string("out", None, "MP4 or GIF to write", required=True)


def observed_frames(config: ExperimentConfig) -> np.ndarray:
    """uint8 (1, V, f, H, W, 3): as many of the inputs' last frames as the tokenizer takes, 1 + 4n up to `data.past_frames`."""
    cameras, size = config.data.cameras, config.data.image_size
    if len(_INPUT.value) > len(cameras):
        raise ConfigError(f"there are {len(_INPUT.value)} --input; expected one for each camera of {', '.join(cameras)}")
    inputs = [read_frames(path, config.data.video_hz, config.data.past_frames) for path in _INPUT.value]
    length = 1 + (min(map(len, inputs)) - 1) // 4 * 4
    views = [resize_images(crop_to_shape(frames[-length:], size), size) for frames in inputs]
    return stack_views(dict(zip(cameras, views, strict=False)), cameras)[None]


def main(config: ExperimentConfig) -> None:
    run = run_path(_WORKDIR.value)
    directory.require_same_model(directory.read_config(run), config, run, "tokenizer", "backbone")
    height, width = config.data.image_size
    check_writable(_OUT.value, (len(config.data.cameras) * height, width))
    past = observed_frames(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, past_frames=past.shape[2]))
    encode_text, vam = make_text_encoder(config.text, config.backbone.text_width), VideoActionModel(config)
    guidance = (encode_text(_NEGATIVE.value)[None], _GUIDANCE.value) if _GUIDANCE.value else ()
    params, step = checkpoints.load_params(run)
    noise = vam.policy_noise(config.seed, 1)["video"]
    views = len(config.data.cameras)
    given = None if views == 1 else len(_INPUT.value) > np.arange(views)[None]
    observed = Observation(encode_text(_PROMPT.value)[None], past, view_mask=given)
    conditioning = jax.jit(vam.condition)(params, observed, *guidance)
    video = np.asarray(jax.jit(vam.sample_video)(params, conditioning, noise))[0]
    video = np.concatenate([past[0], video[:, past.shape[2] :]], axis=1)  # what was observed, not what the tokenizer makes of it
    write_video(_OUT.value, stacked(video), config.data.video_hz)
    print(f"wrote {video.shape[1]} frames at {config.data.video_hz:g} Hz to {_OUT.value} (weights of step {step})")


if __name__ == "__main__":
    experiment.run(main, (MediaError, RunError))
