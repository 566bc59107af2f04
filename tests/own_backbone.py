"""A video backbone as a user would write one: a token for each latent, that sees means of its view, the window and the text."""

import jax
import jax.numpy as jnp
from flax import nnx

from mimic_video.registry import BACKBONES


class Layer(nnx.Module):
    def __init__(self, width, rngs):
        self.own, self.view, self.window = (nnx.Linear(width, width, rngs=rngs) for _ in range(3))

    def __call__(self, x, given):
        view, window = x.mean((2, 3, 4), keepdims=True), x.mean((1, 2, 3, 4), keepdims=True)
        return x + jax.nn.gelu(self.own(x) + self.view(view) + self.window(window) + given)


@BACKBONES.register("means")
class Means(nnx.Module):
    def __init__(self, channels, config, rngs):
        width = config.width
        self.enter = nnx.Linear(channels + 2, width, rngs=rngs)
        self.text = nnx.Linear(config.text_width, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, rngs) for _ in range(config.num_blocks)])
        self.leave = nnx.Linear(width, channels, rngs=rngs)

    @classmethod
    def build(cls, config, rngs):
        return cls(config.latent_shape[-1], config.backbone, rngs)

    def run(self, inputs, stop):
        latents, times, text, conditioned, *_ = inputs
        frames = jnp.stack([times, conditioned], axis=-1).astype(latents.dtype)[:, None, :, None, None]
        x = self.enter(jnp.concatenate([latents, jnp.broadcast_to(frames, (*latents.shape[:-1], 2))], axis=-1))
        given = self.text(text.mean(1))[:, None, None, None, None]
        for layer in self.layers[:stop]:
            x = layer(x, given)
        return x

    def hidden(self, inputs, *, stop):
        x = jnp.moveaxis(self.run(inputs, stop), 1, 2)  # b t v h w d
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def __call__(self, inputs):
        return self.leave(self.run(inputs, len(self.layers)))
