"""A trained Video-Action Model as a policy: observations in, action chunks out, in raw units."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from mimic_video.config import ExperimentConfig
from mimic_video.embodiments import Embodiment, choose, pad_last
from mimic_video.flow.inpainting import prefix_weights
from mimic_video.models.text import make_text_encoder
from mimic_video.policy.execution import Committed
from mimic_video.training import checkpoints, run_directory
from mimic_video.transforms import stack_views
from mimic_video.vam import Params, Prefix, Robots, VideoActionModel

_KEPT_INSTRUCTIONS = 64  # whose features stay in memory: a server's clients may ask for anything


class Policy:
    """Plans action chunks for a batch of robots of one embodiment: one partial video forward and one action flow per chunk.

    A plan is a function of its observations, the seed and the query index.
    """

    def __init__(self, config: ExperimentConfig, params: Params, embodiment: Embodiment, seed: int = 0):
        self.config, self.embodiment = config, embodiment
        self.normalizers = embodiment.normalizers(config)
        self._params, self._seed = params, seed
        self._encode_text = make_text_encoder(config.text)
        self._text: dict[str, np.ndarray] = {}
        self._vam = VideoActionModel(config)
        self._plan = jax.jit(self._vam.sample_actions)

    @classmethod
    def load(cls, run: str | pathlib.Path, config: ExperimentConfig | None = None, embodiment: str | None = None) -> Self:
        """The policy of an `action` run's newest checkpoint.

        Args:
            config: the run's own configuration with other `policy` settings; None for as trained.
            embodiment: the robot to drive, by the name of its dataset; may be left out where the run has only one.

        Raises:
            RunError: if `run` is not a finished or running run of stage `action`.
            ConfigError: listing the run's embodiments, if the named one is not among them.
        """
        run = pathlib.Path(run)
        trained = run_directory.read_config(run)
        if trained.stage != "action":
            raise run_directory.RunError(f"{run} holds a run of stage '{trained.stage}'; a policy needs stage 'action'")
        params, _ = checkpoints.load_params(run)
        return cls(config or trained, params, choose(run_directory.load_embodiments(run), embodiment))

    def __call__(
        self,
        images: UInt8[np.ndarray, "b f h w 3"] | Mapping[str, UInt8[np.ndarray, "b f h w 3"]],
        proprio: Float[np.ndarray, "b p"],
        instructions: Sequence[str],
        query: int = 0,
        committed: Committed | None = None,
    ) -> Float[np.ndarray, "b a m"]:
        """Action chunks in raw units, at `data.control_hz`.

        Args:
            images: the last `data.past_frames` frames at `data.video_hz`, the current one last. With several `data.cameras` those
                of each by its name, or of all, one above the other.
            proprio: current proprioception in raw units.
            instructions: one per robot.
            query: counts the plans of an episode, so that their noise differs (unless it is the published one).
            committed: actions that the chunks have to continue (real-time chunking); None for none. Where actions are poses as
                seen from the current hand, so are these: `execution.in_base_frame` sees to it.

        Raises:
            ValueError: naming the argument, if a shape or dtype is not the one the policy was trained on.
        """
        data, decoder = self.config.data, self.config.decoder
        batch = len(instructions)
        video = self._stack(images) if isinstance(images, Mapping) else images
        for name, value, shape in (
            ("images", video, (batch, data.past_frames, *data.frame_size, 3)),
            ("proprio", proprio, (batch, self.embodiment.proprio_dim)),
        ):
            if value.shape != shape:
                raise ValueError(f"policy input '{name}' has shape {value.shape}; expected {shape}")
        if video.dtype != np.uint8:
            raise ValueError(f"policy input 'images' has dtype {video.dtype}; expected uint8")
        for instruction in set(instructions) - self._text.keys():
            self._text[instruction] = self._encode_text(instruction)
        text = np.stack([self._text[instruction] for instruction in instructions])
        while len(self._text) > _KEPT_INSTRUCTIONS:
            del self._text[next(iter(self._text))]
        noise = self._vam.policy_noise(self._seed, batch, query)
        normalised = pad_last(self.normalizers["proprio"].normalize(proprio[:, None]), decoder.proprio_dim)
        prefix = None if committed is None else self._prefix(committed, batch)
        actions = self._plan(self._params, jnp.asarray(video), normalised, text, noise, self._robots(batch), prefix)
        return self.normalizers["action"].unnormalize(np.asarray(actions)[..., : self.embodiment.action_dim])

    def _stack(self, images: Mapping[str, np.ndarray]) -> np.ndarray:
        expected = set(self.config.data.cameras) & set(self.embodiment.cameras)
        if set(images) != expected:
            raise ValueError(f"policy input 'images' is of the cameras {sorted(images)}; expected {sorted(expected)}")
        if len({value.shape for value in images.values()}) > 1:
            shapes = {name: value.shape for name, value in images.items()}
            raise ValueError(f"policy input 'images' has shapes {shapes}; expected one and the same")
        return stack_views(images, self.config.data.cameras)

    def _prefix(self, committed: Committed, batch: int) -> Prefix:
        """Committed actions in normalised units, filled up with zeros that do not count."""
        (actions, delay), horizon = committed, self.config.decoder.action_horizon
        overlap = actions.shape[1] if actions.ndim == 3 else 0
        if actions.shape != (batch, overlap, self.embodiment.action_dim) or not 1 <= overlap <= horizon:
            raise ValueError(f"policy input 'committed' has actions of shape {actions.shape}; expected ({batch}, 1 to {horizon}, "
                             f"{self.embodiment.action_dim})")
        if not np.isfinite(actions).all():
            raise ValueError("policy input 'committed' has actions that are not finite")
        weights = prefix_weights(horizon, delay, overlap)
        filled = np.pad(actions, [(0, 0), (0, horizon - overlap), (0, 0)])
        normalised = pad_last(self.normalizers["action"].normalize(filled), self.config.decoder.action_dim)
        return Prefix(jnp.asarray(normalised), jnp.tile(weights, (batch, 1)))

    def _robots(self, batch: int) -> Robots:
        """What the model has to be told of `batch` times this robot."""
        robot, cameras, width = self.embodiment, self.config.data.cameras, self.config.decoder.action_dim
        narrow, views = robot.action_dim < width, np.isin(cameras, robot.cameras)
        return Robots(
            embodiment=jnp.full(batch, robot.index) if self.config.decoder.embodiments else None,
            action_dims=jnp.tile(jnp.arange(width) < robot.action_dim, (batch, 1)) if narrow else None,
            view_mask=jnp.tile(views, (batch, 1)) if len(cameras) > 1 else None,
        )
