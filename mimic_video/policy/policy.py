"""A trained Video-Action Model as a policy: observations in, action chunks out, in raw units."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from mimic_video.config import ExperimentConfig
from mimic_video.embodiments import Embodiment, choose, pad_last
from mimic_video.flow.inpainting import prefix_weights
from mimic_video.models.protocols import TextEncoder
from mimic_video.models.text import make_text_encoder
from mimic_video.policy import bundle, hub
from mimic_video.policy.program import PolicyProgram
from mimic_video.policy.strategies import Committed
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import local_path, run_path
from mimic_video.transforms import resize_images, stack_views
from mimic_video.vam import Params, Prefix

Images = UInt8[np.ndarray, "b *v f h w 3"] | Mapping[str, UInt8[np.ndarray, "b f _ _ 3"]]

_KEPT_INSTRUCTIONS = 64  # whose features stay in memory: a server's clients may ask for anything


class Policy:
    """Plans action chunks for a batch of robots of one embodiment: one partial video forward and one action flow per chunk.

    A plan is a function of its observations, the seed and the query index. It is one compiled program from raw inputs to raw
    actions (`program`); only images of another size are resized before it, on the host, by the function that training used.
    A process that calls `cache.keep_compiled_programs()` first finds programs that an earlier one has compiled.

    Attributes:
        config, embodiment: what it is, and the robot that it drives.
        normalizers: of the robot's "action" and "proprio".
        params: of all networks, as the program takes them.
        encode_text: instruction → its rows; a bundle's knows the instructions that it was exported with.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        params: Params,
        embodiment: Embodiment,
        seed: int = 0,
        encode_text: TextEncoder | None = None,
    ):
        """`encode_text`: in place of the encoder that `config.text` describes."""
        self.config, self.embodiment = config, embodiment
        self.normalizers = embodiment.normalizers(config)
        self.program = PolicyProgram(config, embodiment, seed)
        self.params = self.program.parameters(params)
        self.encode_text = encode_text or make_text_encoder(config.text, config.backbone.text_width)
        self._text: dict[str, np.ndarray] = {}
        self._plan = jax.jit(self.program, static_argnames="samples")
        self._key_data = jax.jit(lambda query: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), query)))

    @classmethod
    def load(cls, path: str | os.PathLike, config: ExperimentConfig | None = None, embodiment: str | None = None) -> Self:
        """The policy of a bundle (launch/export.py), or of an `action` run's newest checkpoint.

        Args:
            path: a directory, `gs://BUCKET/RUN`, or `hf://USER/NAME[@REVISION]` for a bundle of the Hugging Face Hub.
            config: its own configuration with other `policy` settings; None for as trained.
            embodiment: the robot to drive, by its name; may be left out where there is only one.

        Raises:
            BundleError: naming the file, if a bundle is damaged, not complete, or of a later version.
            RunError: if `path` is neither a bundle nor a finished or running run of stage `action`, or cannot be fetched.
            ConfigError: listing the embodiments there are, if the named one is not among them.
        """
        if hub.is_on_hub(path):
            folder = hub.fetch(os.fspath(path))
            try:
                return cls.load(folder, config, embodiment)
            except bundle.BundleError as error:
                kept = folder.parents[2]
                raise bundle.BundleError(
                    f"{path}: {error}. What was downloaded stays in {kept}: delete that folder to download it again"
                ) from error
        run = run_path(path)
        if bundle.is_bundle(run):
            own, params, embodiments, encode_text = bundle.read_bundle(local_path(path))
            return cls(config or own, params, choose(embodiments, embodiment), encode_text=encode_text)
        trained = directory.read_policy_config(run)
        params, _ = checkpoints.load_params(run)
        return cls(config or trained, params, choose(directory.load_embodiments(run), embodiment))

    def __call__(
        self,
        images: Images,
        proprio: Float[np.ndarray, "b p"],
        instructions: Sequence[str],
        query: int = 0,
        committed: Committed | None = None,
    ) -> Float[np.ndarray, "b a m"]:
        """Action chunks in raw units, at `data.control_hz`.

        Args:
            images: the last `data.past_frames` frames at `data.video_hz`, the current one last; of any size. With several
                `data.cameras` those of each by its name, or of all in the size of training, on an axis after the robots'.
            proprio: current proprioception in raw units.
            instructions: one per robot.
            query: counts the plans of an episode, so that their noise differs (unless it is the published one).
            committed: actions that the chunks have to continue (real-time chunking); None for none. Where actions are poses as
                seen from the current hand, so are these: `strategies.in_base_frame` sees to it.

        Raises:
            ValueError: naming the argument, if a shape or dtype is not one that the policy can use.
        """
        inputs = self.prepare(images, proprio, instructions, query)
        prefix = None if committed is None else self._prefix(committed, len(instructions))
        return np.asarray(self._plan(*inputs, prefix, samples=None))

    def sample(
        self, images: Images, proprio: Float[np.ndarray, "b p"], instructions: Sequence[str], samples: int, query: int = 0
    ) -> Float[np.ndarray, "b {samples} a m"]:
        """Several chunks for every robot, of one video pass: the first is that of a call, others have other action noise.

        Arguments and errors are those of a call. The spread of samples tells how sure the policy is of what to do next.
        """
        if samples < 1:
            raise ValueError(f"policy input 'samples' is {samples}; expected 1 or more")
        return np.asarray(self._plan(*self.prepare(images, proprio, instructions, query), None, samples=samples))

    def warm_up(self, batch: int = 1, samples: int | None = None) -> float:
        """Compiles the program for `batch` robots and runs it once, so that no robot waits for that. Returns the seconds.

        In real-time chunking that is two programs: of first plans, and of those that continue another one.
        """
        data, text, start = self.config.data, (self.config.text.rows, self.config.backbone.text_width), time.perf_counter()
        images = np.zeros((batch, len(data.cameras), data.past_frames, *data.image_size, 3), np.uint8)
        proprio, rows = np.zeros((batch, self.embodiment.proprio_dim), np.float32), np.zeros((batch, *text), np.float32)
        arguments = images, proprio, rows, self._key_data(0)
        jax.block_until_ready(self._plan(self.params, *arguments, None, samples=samples))
        if self.config.policy.strategy == "real_time_chunking" and samples is None:
            still = Committed(np.zeros((batch, 1, self.embodiment.action_dim), np.float32), 0)
            jax.block_until_ready(self._plan(self.params, *arguments, self._prefix(still, batch), samples=None))
        return time.perf_counter() - start

    def prepare(
        self, images: Images, proprio: Float[np.ndarray, "b p"], instructions: Sequence[str], query: int = 0
    ) -> tuple[Any, ...]:
        """What the program takes for a call with the same arguments: all that is done on the host."""
        data = self.config.data
        batch = len(instructions)
        video = self._views(images) if isinstance(images, Mapping) else images
        if video.dtype != np.uint8:
            raise ValueError(f"policy input 'images' has dtype {video.dtype}; expected uint8")
        expected: tuple[int, ...] = (batch, len(data.cameras), data.past_frames, *data.image_size, 3)
        if len(data.cameras) == 1 and video.ndim != len(expected):
            expected = (batch, *expected[2:])
            if video.ndim == len(expected) and video.shape[-1] == 3 and min(video.shape) > 0:
                video = resize_images(video, data.image_size)
        for name, value, shape in (("images", video, expected), ("proprio", proprio, (batch, self.embodiment.proprio_dim))):
            if value.shape != shape:
                raise ValueError(f"policy input '{name}' has shape {value.shape}; expected {shape}")
        video = video.reshape(batch, -1, *expected[-4:])
        for instruction in set(instructions) - self._text.keys():
            self._text[instruction] = self.encode_text(instruction)
        text = np.stack([self._text[instruction] for instruction in instructions])
        while len(self._text) > _KEPT_INSTRUCTIONS:
            del self._text[next(iter(self._text))]
        return self.params, video, np.asarray(proprio, np.float32), text, self._key_data(query)

    def _views(self, images: Mapping[str, UInt8[np.ndarray, "b f _ _ 3"]]) -> UInt8[np.ndarray, "b v f h w 3"]:
        """Those of all cameras, in the size of training."""
        expected = set(self.config.data.cameras) & set(self.embodiment.cameras)
        if set(images) != expected:
            raise ValueError(f"policy input 'images' is of the cameras {sorted(images)}; expected {sorted(expected)}")
        shapes = {name: value.shape for name, value in images.items()}
        if len({(*shape[:-3], shape[-1]) for shape in shapes.values()}) > 1:
            raise ValueError(f"policy input 'images' has shapes {shapes}; expected one and the same but for height and width")
        resized = {name: resize_images(value, self.config.data.image_size) for name, value in images.items()}
        return stack_views(resized, self.config.data.cameras)

    def _prefix(self, committed: Committed, batch: int) -> Prefix:
        """Committed actions in normalised units, filled up with zeros that do not count."""
        (actions, delay), horizon = committed, self.config.data.action_horizon
        overlap = actions.shape[1] if actions.ndim == 3 else 0
        if actions.shape != (batch, overlap, self.embodiment.action_dim) or not 1 <= overlap <= horizon:
            raise ValueError(
                f"policy input 'committed' has actions of shape {actions.shape}; expected ({batch}, 1 to {horizon}, "
                f"{self.embodiment.action_dim})"
            )
        if not np.isfinite(actions).all():
            raise ValueError("policy input 'committed' has actions that are not finite")
        weights = prefix_weights(horizon, delay, overlap)
        filled = np.pad(actions, [(0, 0), (0, horizon - overlap), (0, 0)])
        normalised = pad_last(self.normalizers["action"].normalize(filled), self.config.decoder.action_dim)
        return Prefix(jnp.asarray(normalised), jnp.tile(weights, (batch, 1)))
