"""Model FLOPs: the matrix products and convolutions of a program as JAX traces it, at two operations a multiply-add.

Nothing else counts, nor does what is computed again to save memory. A network needs no counting of its own: its products are in
the trace.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params
from jaxtyping import Array, Float

from mimic_video.batch import Batch, batch_shapes
from mimic_video.models.devices import PAPER, assuming
from mimic_video.stages import join_params, split_params
from mimic_video.vam import Conditioning, Params, VideoActionModel

_AGAIN = "rematted_computation"  # the scope in which `jax.checkpoint` computes again


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one optimisation step over the whole batch, by what they are spent on.

    Attributes:
        tokenizer: encoding frames; zero if the latents were precomputed. No part of `model`: it is no part of the models.
        weights: products with weights of the backbone and the decoder.
        attention: queries with keys, and weights with values, of both.
        adapters: merging low-rank adapters into the weights, and their gradients from the weights'; once a step.
    """

    tokenizer: int
    weights: int
    attention: int
    adapters: int

    @property
    def model(self) -> int:
        """All but the tokenizer's: what utilisation is measured by."""
        return self.weights + self.attention + self.adapters


def step_flops(vam: VideoActionModel) -> StepFlops:
    """Operations of an optimisation step of a model's stage: of the gradient of its loss, traced for one sample."""
    config = vam.config

    def loss(trained: Params, frozen: Params, batch: Batch) -> Float[Array, ""]:
        return vam.loss(join_params(trained, frozen, config), batch, vam.draw(jax.random.key(0), 1))[0]

    trained, frozen = jax.eval_shape(lambda params: split_params(params, config), vam.shapes)
    with assuming(PAPER):
        gradient = jax.make_jaxpr(jax.grad(loss))(trained, frozen, batch_shapes(config, 1))
    # Scopes of `VideoActionModel.encode_video`, `join_network` and `attention`. The tokenizer's attention is the tokenizer's.
    found, batch = products(gradient.jaxpr, ("encode", "adapters", "attention")), config.train.batch_size
    return StepFlops(batch * found["encode"], batch * found[""], batch * found["attention"], found["adapters"])


def video_tokens(vam: VideoActionModel) -> int:
    """Tokens of one sample's video in the backbone, and hidden states that the decoder attends to."""
    latents: Any = jax.eval_shape(lambda: vam.draw_noise(jax.random.key(0), 1)["video"])
    time, text = jax.ShapeDtypeStruct((1,), jnp.float32), batch_shapes(vam.config, 1).observation.text
    with assuming(PAPER):
        return jax.eval_shape(vam.hidden_at, vam.shapes, Conditioning(latents, text), latents, time).shape[1]


def products(jaxpr: Jaxpr, scopes: tuple[str, ...] = ()) -> collections.Counter[str]:
    """Operations in products of a program as it was traced: loops as often as they run, of branches the dearest.

    Args:
        scopes: of `jax.named_scope`.

    Returns:
        By the outermost of those scopes; "" outside of them.

    Raises:
        ValueError: if there are products in a `while` loop, as nothing says how often it runs.
    """
    found: collections.Counter[str] = collections.Counter()
    for equation in jaxpr.eqns:
        names = re.findall(r"\w+", str(equation.source_info.name_stack))
        if _AGAIN in names:
            continue
        scope = next((name for name in names if name in scopes), "")
        found[scope] += _product(equation)
        inner = [products(each, () if scope else scopes) for each in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: branch.total())]
        for name, operations in sum(inner, collections.Counter()).items():
            found[name or scope] += _times(equation) * operations
    return +found  # those that there are


def _product(equation: Any) -> int:
    """Operations of a matrix product or a convolution; zeros around a picture count, those between its pixels do not."""
    name, params = equation.primitive.name, equation.params
    if name not in ("dot_general", "conv_general_dilated"):
        return 0
    left, right, outputs = (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        return 2 * math.prod(outputs) * math.prod(left[axis] for axis in contracted)
    window = math.prod(right) // right[params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(outputs) * window // math.prod(params["lhs_dilation"])


def _times(equation: Any) -> int:
    """How often the programs inside of an equation that has products there run."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        raise ValueError("a `while` loop has products, and nothing says how often it runs; expected a scan")
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # on every device
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1
