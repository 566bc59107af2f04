"""Converts published weights into a run directory that every other command reads, and a run back into published files.

    python launch/convert.py --config=configs/published.py:bridge --source=/data/mimic-video --workdir=runs/bridge \\
        --backbone='video_backbone/v2w_bridge*_fused.pt' --decoder='action_decoder/w2a_bridge*.pt' \\
        --statistics=dataset_statistics/bridge.json
    python launch/convert.py --config=configs/published.py:cosmos --source=nvidia/Cosmos-Predict2-2B-Video2World \\
        --workdir=runs/cosmos
    python launch/convert.py --workdir=runs/bridge --out=/data/export --published_keys=bridge

--source is a folder, or a Hugging Face repository, which is fetched. With --backbone it has the layout of the published
repository (SPEC 11); without, that of diffusers (`transformer/`, `vae/`), and holds a backbone and a tokenizer. Patterns are
relative to it and match exactly one file. Checkpoints with LoRA layers are fused. Run in the other direction, with --out, the
files go to `video_backbone/`, `action_decoder/` and `dataset_statistics/` of --out under the run's name, with the published
tensor names.
"""

import sys
from typing import Any

import experiment
import jax
from absl import flags

from mimic_video.config import ExperimentConfig
from mimic_video.runs.storage import RunError, local_path, run_path
from mimic_video.weights.conversion import Patterns, export_weights, import_weights
from mimic_video.weights.published import WeightsError

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory to write or, with --out, to export", required=True)
_SOURCE = flags.DEFINE_string("source", None, "Folder or Hugging Face repository with weights")
_BACKBONE = flags.DEFINE_string("backbone", None, "Pattern of the backbone's file; none for a source in diffusers' format")
_TOKENIZER = flags.DEFINE_string("tokenizer", "video_backbone/tokenizer/tokenizer.pth", "Pattern of the tokenizer's file")
_DECODER = flags.DEFINE_string("decoder", None, "Pattern of the action decoder's file; for stage `action`")
_STATISTICS = flags.DEFINE_string("statistics", None, "Pattern of the statistics' file; for stage `action`")
_EMA = flags.DEFINE_bool("ema", False, "Take the moving average (net_ema.) of the backbone and the decoder")
_LORA_ALPHA = flags.DEFINE_float("lora_alpha", 32.0, "Alpha of the LoRA layers of a checkpoint that is not fused")
_OUT: flags.FlagHolder[Any] = flags.DEFINE_string("out", None, "Folder to export to; the other direction")
_FORMAT: flags.FlagHolder[Any] = flags.DEFINE_enum("format", "safetensors", ["safetensors", "pt"], "Of exported weights")
_PRECISION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "precision", "stored", ["stored", "float32", "bfloat16"], "Of exported weights"
)
_PUBLISHED_KEYS = flags.DEFINE_enum("published_keys", None, ["bridge", "libero"], "Export statistics under this robot's keys")


def convert(config: ExperimentConfig) -> None:
    patterns = Patterns(_TOKENIZER.value, _BACKBONE.value, _DECODER.value, _STATISTICS.value)
    import_weights(config, _SOURCE.value, run_path(_WORKDIR.value), patterns, _EMA.value, _LORA_ALPHA.value)


def export() -> None:
    run, out = run_path(_WORKDIR.value), local_path(_OUT.value)
    export_weights(run, out, _FORMAT.value, _PRECISION.value, _PUBLISHED_KEYS.value)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and an accelerator may be smaller than the weights
    exporting = any(argument.partition("=")[0] in ("-out", "--out") for argument in sys.argv[1:])
    errors = (RunError, WeightsError, ModuleNotFoundError)
    if exporting:
        experiment.run(export, (*errors, ValueError), config=False, compilation_cache=None)
    else:
        experiment.run(convert, errors, compilation_cache=None)
