"""Model FLOPs of a policy, stage by stage."""

import dataclasses

import jax

from mimic_video.analysis.aot import widest_robot
from mimic_video.config import ExperimentConfig
from mimic_video.models.devices import PAPER, assuming
from mimic_video.policy.program import PolicyProgram
from mimic_video.training.flops import products


@dataclasses.dataclass(frozen=True)
class PolicyFlops:
    """Operations of one robot's action chunk, by the policy's stages.

    Attributes:
        encode: of the observed frames.
        video: every pass of the video sampler, and the one that ends at `hidden_block`.
        context: keys and values of the decoder's cross-attention, once.
        steps: everything else of the decoder, at every Euler step.
    """

    encode: int
    video: int
    context: int
    steps: int

    @property
    def total(self) -> int:
        return self.encode + self.video + self.context + self.steps


def policy_flops(config: ExperimentConfig) -> PolicyFlops:
    """Operations of a chunk as `config.policy` samples it, from a trace of the policy's program. No array is made."""
    program = PolicyProgram(config, widest_robot(config))
    params = jax.eval_shape(program.parameters, program.vam.shapes)
    with assuming(PAPER):
        chunk = jax.make_jaxpr(program)(params, *program.input_shapes(1).values())
    # Scopes of `VideoActionModel.encode_video`, `sample_hidden` and `action_conditioning`.
    found = products(chunk.jaxpr, ("encode", "video", "context"))
    return PolicyFlops(found["encode"], found["video"], found["context"], found[""])
