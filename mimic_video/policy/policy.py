"""A trained Video-Action Model as a policy: observations in, action chunks out, in raw units."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from mimic_video.config import ExperimentConfig
from mimic_video.models.text import make_text_encoder
from mimic_video.training import checkpoints
from mimic_video.transforms import Normalizer, Statistics, from_json
from mimic_video.vam import Params, VideoActionModel


class Policy:
    """Plans action chunks for a batch of robots: one partial video forward and one action flow per chunk.

    A plan is a function of its observations, the seed and the query index.
    """

    def __init__(self, config: ExperimentConfig, params: Params, normalizers: dict[str, Normalizer], seed: int = 0):
        self.config = config
        self.normalizers, self._params, self._seed = normalizers, params, seed
        self._encode_text = make_text_encoder(config.text)
        self._text: dict[str, np.ndarray] = {}
        self._vam = VideoActionModel(config)
        self._plan = jax.jit(self._vam.sample_actions)

    @classmethod
    def load(cls, run: str | pathlib.Path, config: ExperimentConfig | None = None) -> Self:
        """The policy of an `action` run's newest checkpoint.

        Args:
            config: the run's own configuration with other `policy` settings; None for as trained.

        Raises:
            RunError: if `run` is not a finished or running run of stage `action`.
        """
        run = pathlib.Path(run)
        trained = checkpoints.read_config(run)
        if trained.stage != "action":
            raise checkpoints.RunError(f"{run} holds a run of stage '{trained.stage}'; a policy needs stage 'action'")
        params, _ = checkpoints.load_params(run)
        statistics = from_json(json.loads((run / "statistics.json").read_text()))
        return cls(config or trained, params, make_normalizers(statistics, trained))

    def __call__(
        self,
        images: UInt8[np.ndarray, "b f h w 3"],
        proprio: Float[np.ndarray, "b p"],
        instructions: Sequence[str],
        query: int = 0,
    ) -> Float[np.ndarray, "b a m"]:
        """Action chunks in raw units, at `data.control_hz`.

        Args:
            images: the last `data.past_frames` frames at `data.video_hz`, the current one last.
            proprio: current proprioception in raw units.
            instructions: one per robot.
            query: counts the plans of an episode, so that their noise differs (unless it is the published one).

        Raises:
            ValueError: naming the argument, if a shape or dtype is not the one the policy was trained on.
        """
        data, decoder = self.config.data, self.config.decoder
        batch = len(instructions)
        for name, value, shape in (
            ("images", images, (batch, data.past_frames, *data.image_size, 3)),
            ("proprio", proprio, (batch, decoder.proprio_dim)),
        ):
            if value.shape != shape:
                raise ValueError(f"policy input '{name}' has shape {value.shape}; expected {shape}")
        if images.dtype != np.uint8:
            raise ValueError(f"policy input 'images' has dtype {images.dtype}; expected uint8")
        for instruction in set(instructions) - self._text.keys():
            self._text[instruction] = self._encode_text(instruction)
        text = np.stack([self._text[instruction] for instruction in instructions])
        noise = self._vam.policy_noise(self._seed, batch, query)
        normalised = self.normalizers["proprio"].normalize(proprio[:, None])
        actions = self._plan(self._params, jnp.asarray(images), normalised, text, noise)
        return self.normalizers["action"].unnormalize(np.asarray(actions))


def make_normalizers(statistics: Mapping[str, Statistics], config: ExperimentConfig) -> dict[str, Normalizer]:
    """Normalisers of "action" and "proprio" as the experiment configures them."""
    raw = {"action": config.data.raw_action_dims, "proprio": config.data.raw_proprio_dims}
    dtype = jnp.bfloat16 if config.compat.bfloat16_low_dim else np.float32
    return {key: Normalizer.from_statistics(entry, config.data.normalization, key, raw_dims=raw[key], dtype=dtype)
            for key, entry in statistics.items()}  # fmt: skip
