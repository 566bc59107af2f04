"""What flows from data into the model: observations, and batches of them with what is to be predicted.

A field that is None is not needed, or the same for all samples.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt8

from mimic_video.config import ExperimentConfig

Array = Any  # of NumPy where data are read, of JAX in the model


class Observation(NamedTuple):
    """What b samples show: their observed frames or, in training, whole windows.

    Attributes:
        text: rows of features of each sample's instruction.
        video: RGB frames of v cameras, in the order of `data.cameras`; black where a sample lacks one.
        latents: in place of `video`, what the tokenizer makes of it, float32 or bfloat16.
        view_mask: False for cameras that a sample lacks; given where there are several.
        proprio: normalised proprioception, with zeros up to the width of the model.
        embodiment: number of each sample's robot, if the decoder tells robots apart.
        action_dims: False for dimensions of actions that a robot lacks, if one does.
    """

    text: Float[Array, "b rows width"]
    video: UInt8[Array, "b v f h w 3"] | None = None
    latents: Float[Array, "b v t h w c"] | None = None
    view_mask: Bool[Array, "b v"] | None = None
    proprio: Float[Array, "b 1 p"] | None = None
    embodiment: Int[Array, " b"] | None = None
    action_dims: Bool[Array, "b m"] | None = None


class Batch(NamedTuple):
    """Windows to train on; `actions`, `action_mask` and the observation's last three fields are those of stage `action`.

    Attributes:
        observation: of whole windows, the past and the future.
        frame_mask: False for frames beyond the episode.
        actions: normalised chunks, with zeros up to the width of the model.
        action_mask: False for actions beyond the episode.
        action_scale: raw units of one normalised unit; for errors in raw units.
    """

    observation: Observation
    frame_mask: Bool[Array, "b f"]
    actions: Float[Array, "b a m"] | None = None
    action_mask: Bool[Array, "b a"] | None = None
    action_scale: Float[Array, "b a m"] | None = None


def fields(batch: Batch) -> dict[str, Any]:
    """The fields of a batch that are there, those of its observation among them. `make_batch` undoes it."""
    both = {**batch.observation._asdict(), **batch._asdict()}
    return {name: value for name, value in both.items() if value is not None and name != "observation"}


def make_batch(fields: dict[str, Any]) -> Batch:
    """A batch of fields by name, those of its observation among them."""
    observed = {name: value for name, value in fields.items() if name in Observation._fields}
    return Batch(Observation(**observed), **{name: value for name, value in fields.items() if name not in observed})


def batch_shapes(config: ExperimentConfig, size: int) -> Batch:
    """Shapes and dtypes of a batch of `size` windows of datasets that have all cameras and dimensions of actions."""
    shapes, action = _all_shapes(config, size), config.stage == "action"
    there = {
        "video": not config.data.latents,
        "latents": bool(config.data.latents),
        "view_mask": len(config.data.cameras) > 1,
        "proprio": action,
        "embodiment": action and bool(config.decoder.embodiments),
        "action_dims": False,
        "actions": action,
        "action_mask": action,
        "action_scale": False,
    }
    return make_batch({name: shape for name, shape in shapes.items() if there.get(name, True)})


def require_shapes(batch: Batch, config: ExperimentConfig) -> None:
    """Checks shapes and masks that would otherwise be broadcast, or multiplied as numbers, in silence.

    Raises:
        AssertionError: naming the field that is missing, or whose shape or dtype is not the configuration's.
    """
    size = len(batch.observation.text)
    given, needed = fields(batch), fields(batch_shapes(config, size))
    for name, wanted in _all_shapes(config, size).items():
        if name in ("video", "latents"):  # of any length and size, and one stands for the other
            continue
        message = f"field {name!r} of the batch"
        assert name in given or name not in needed, f"{message} is missing"
        if name in given:
            shape = (size, None, wanted.shape[-1]) if name == "text" else wanted.shape  # text may be of any number of rows
            chex.assert_shape(given[name], shape, custom_message=message)
            if wanted.dtype == bool:
                chex.assert_type(given[name], bool, custom_message=message)


def _all_shapes(config: ExperimentConfig, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    data, decoder, views = config.data, config.decoder, len(config.data.cameras)
    chunk = (data.action_horizon, decoder.action_dim)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "text": ((config.text.rows, config.backbone.text_width), jnp.float32),
        "video": ((views, data.num_frames, *data.image_size, 3), jnp.uint8),
        "latents": ((views, *config.latent_shape), config.precision),
        "view_mask": ((views,), bool),
        "proprio": ((1, decoder.proprio_dim), jnp.float32),
        "embodiment": ((), jnp.int32),
        "action_dims": (chunk[1:], bool),
        "frame_mask": ((data.num_frames,), bool),
        "actions": (chunk, jnp.float32),
        "action_mask": (chunk[:1], bool),
        "action_scale": (chunk, jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}
