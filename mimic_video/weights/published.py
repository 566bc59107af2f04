"""Parameter names and layouts of the published PyTorch networks ↔ our parameter trees (SPEC 3.10, 6.3).

A network's tree is the pure dict of its NNX state, with blocks stacked on a leading axis. PyTorch's dense weights are
(outputs, inputs), ours (inputs, outputs).
"""

import re
from collections.abc import Mapping

import numpy as np

Tree = dict  # nested dict of arrays

# (published name, our path). {i} is a block; `weight` of a dense layer becomes `kernel`.
_ATTENTION = [("{p}_proj.weight", "{p}_proj/kernel", p) for p in ("q", "k", "v")] + [
    ("output_proj.weight", "out_proj/kernel", ""),
    ("q_norm.weight", "q_norm/scale", ""),
    ("k_norm.weight", "k_norm/scale", ""),
]


def _block_names() -> dict[str, str]:
    names = {"mlp.layer1.weight": "mlp/up/kernel", "mlp.layer2.weight": "mlp/down/kernel"}
    for attention in ("self_attn", "cross_attn"):
        names |= {f"{attention}.{a.format(p=p)}": f"{attention}/{b.format(p=p)}" for a, b, p in _ATTENTION}
    for layer in ("self_attn", "cross_attn", "mlp"):
        names |= _modulation_names(f"adaln_modulation_{layer}", f"{layer}_modulation")
    return {f"blocks.{{i}}.{published}": f"blocks/{ours}" for published, ours in names.items()}


def _modulation_names(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.1.weight": f"{ours}/down/kernel", f"{published}.2.weight": f"{ours}/up/kernel"}


_FINAL = {"final_layer.linear.weight": "final_proj/kernel"} | _modulation_names(
    "final_layer.adaln_modulation", "final_modulation"
)

VIDEO_DIT_NAMES = {
    "x_embedder.proj.1.weight": "patch_proj/kernel",
    "t_embedder.1.linear_1.weight": "time_in/kernel",
    "t_embedder.1.linear_2.weight": "time_out/kernel",
    "t_embedding_norm.weight": "time_norm/scale",
} | _block_names() | _FINAL

ACTION_DECODER_NAMES = {
    "obs_mask_token": "proprio_mask_token",
    "pos_embedding": "position_embedding",
    "ctx_norm.weight": "context_norm/scale",
    "ctx_norm.bias": "context_norm/bias",
    "t_embedder.pair.A.weight": "time_embedding/shared_proj/kernel",
    "t_embedding_norm.weight": "time_embedding/norm/scale",
} | _block_names() | _FINAL  # fmt: skip
for _published, _ours in (("proj_x", "action_proj"), ("proj_c", "video_proj"), ("B", "action_rank"), ("C", "video_rank")):
    ACTION_DECODER_NAMES[f"t_embedder.pair.{_published}.weight"] = f"time_embedding/{_ours}/kernel"
    ACTION_DECODER_NAMES[f"t_embedder.pair.{_published}.bias"] = f"time_embedding/{_ours}/bias"
for _published, _ours in (("obs_embedder", "proprio_embedder"), ("action_embedder", "action_embedder")):
    for _layer in range(8):  # PyTorch's sequence holds an activation between dense layers
        ACTION_DECODER_NAMES[f"{_published}.layers.{2 * _layer}.weight"] = f"{_ours}/layers/{_layer}/kernel"
        ACTION_DECODER_NAMES[f"{_published}.layers.{2 * _layer}.bias"] = f"{_ours}/layers/{_layer}/bias"

IGNORED = re.compile(r"accum_.*|pos_embedder\..*|.*_extra_state")  # counters and buffers, no parameters


def from_published(state: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Our flat parameters ('a/b/kernel' → array) from a published state dict without its `net.` prefix.

    Raises:
        ValueError: listing every key that is not known, and every block whose parameters do not run from 0 without a gap.
    """
    flat: dict[str, np.ndarray] = {}
    blocks: dict[str, dict[int, np.ndarray]] = {}
    problems = []
    for key, value in state.items():
        if IGNORED.fullmatch(key):
            continue
        block = re.match(r"blocks\.(\d+)\.", key)
        path = names.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", key))
        if path is None:
            problems.append(f"unexpected '{key}'")
            continue
        value = value.T if path.endswith("/kernel") else value
        if block:
            blocks.setdefault(path, {})[int(block[1])] = value
        else:
            flat[path] = value
    depth = 1 + max((index for members in blocks.values() for index in members), default=-1)
    for path, members in blocks.items():
        problems += [f"missing block {i} of '{path}'" for i in range(depth) if i not in members]
    if problems:
        raise ValueError("published weights do not fit: " + "; ".join(problems))
    return flat | {path: np.stack([members[i] for i in range(depth)]) for path, members in blocks.items()}
