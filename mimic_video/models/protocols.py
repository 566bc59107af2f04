"""What a tokenizer, a video backbone and a text encoder are to the rest of the system, whichever it is.

The first two are NNX modules. `build` makes one of an experiment; its settings are those of the experiment that it reads. A part
with settings of its own is registered once for each choice of them.
"""

from typing import ClassVar, NamedTuple, Protocol, Self

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from mimic_video.config import ExperimentConfig

Latents = Float[Array, "b v t h w c"]
ViewMask = Bool[Array, "b v"]  # False for a view that a sample does not have


class Tokenizer(Protocol):
    """Video in [−1, 1] ↔ latents with about unit variance in each channel (SPEC 1).

    The latents of a prefix of the frames are the prefix of the latents. A tokenizer that is fitted to data has also `fit(video)`,
    which takes sample videos (b, f, h, w, 3), and returns the shares of their variance that it cannot hold.

    Attributes:
        time_stride: frames of a latent frame; the first one is of one frame.
        stride: pixels along each side of a latent pixel.
        channels: of a latent.
        exact: computes in float32, whatever `precision` says.
        pretrained: is of no use without the weights of a `backbone_run`.
    """

    time_stride: ClassVar[int]
    stride: ClassVar[int]
    channels: ClassVar[int]
    exact: ClassVar[bool]
    pretrained: ClassVar[bool]

    @classmethod
    def build(cls, config: ExperimentConfig, rngs: nnx.Rngs) -> Self: ...

    def encode(self, video: Float[Array, "b f y x 3"]) -> Float[Array, "b t h w c"]:
        """1 + n·time_stride frames → 1 + n latent frames."""
        ...

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b f y x 3"]:
        """Inverse of `encode`, up to what latents cannot hold; not clipped."""
        ...


class VideoInputs(NamedTuple):
    """What a video backbone computes from.

    Attributes:
        latents: clean conditioned frames, noised other frames (SPEC 4.1).
        times: flow time τ of each latent frame, in [0, 1].
        text: text rows; every row takes part, so published models need exactly 512 (SPEC 2).
        condition_mask: 1 for conditioned frames.
        padding_mask: 1 for latent pixels outside the picture; None for none.
        view_mask: False for views that nothing attends to; None if every sample has all of them. Each has positions of its own.
    """

    latents: Latents
    times: Float[Array, "b t"]
    text: Float[Array, "b s e"]
    condition_mask: Float[Array, "b t"]
    padding_mask: Float[Array, "b v h w"] | None = None
    view_mask: ViewMask | None = None


class Backbone(Protocol):
    """Velocity of latent video under the flow, and hidden states on the way to it (SPEC 3).

    Names of parameters decide how they are spread over devices (parallel/sharding.py) and adapted (`LoraConfig`); those of
    `VideoDiT` need nothing new.
    """

    @classmethod
    def build(cls, config: ExperimentConfig, rngs: nnx.Rngs) -> Self: ...

    def __call__(self, inputs: VideoInputs) -> Latents:
        """The velocity ε − x₀ of every latent frame."""
        ...

    def hidden(self, inputs: VideoInputs, *, stop: int) -> Float[Array, "b t n d"]:
        """The state after `stop` blocks, which reads no later block; d is `backbone.width`.

        Tokens of a latent frame are those of its views one after the other, of every view the same number.
        """
        ...


class TextEncoder(Protocol):
    """Made of a `TextConfig` and the width of features."""

    def __call__(self, instruction: str) -> Float[np.ndarray, "rows width"]:
        """Features of one instruction; rows past its end are zero."""
        ...
