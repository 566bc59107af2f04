"""Fills `text.cache` with the T5 features of prompts, so that neither training nor a robot's machine has to run the text model.

    python launch/precompute_text.py --config=configs/EXPERIMENT.py --config.text.cache=runs/text --device=cuda
    python launch/precompute_text.py --config=configs/EXPERIMENT.py --config.text.cache=runs/text --prompts=prompts.txt

Embeds every instruction of the datasets that the experiment names, in all of their splits, and every line of --prompts. What the
cache has already is skipped, so the same command continues after an interruption. The cache may be copied to other machines.
"""

import pathlib
import time

import experiment
from absl import flags

from data_pipelines.datasets import find_instructions
from data_pipelines.sources.rlds import DatasetError
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.models.text import T5TextEncoder, read_prompts
from mimic_video.progress import progress

_PROMPTS = flags.DEFINE_string("prompts", None, "UTF-8 file of further prompts, one per line; blank lines are skipped")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Prompts that are encoded at once", lower_bound=1)
_DEVICE = flags.DEFINE_string("device", "cpu", "PyTorch device of the text model, e.g. cuda")


def main(config: ExperimentConfig) -> None:
    if config.text.kind != "t5":
        raise ConfigError(f"config field 'text.kind' is {config.text.kind!r}; expected 't5', the encoder that has a cache")
    if not config.text.cache:
        raise ConfigError("config field 'text.cache' is empty; expected the folder to fill")
    if not (config.data.video_dataset or config.data.action_dataset or _PROMPTS.value):
        raise ConfigError(
            "there is nothing to embed: config fields 'data.video_dataset' and 'data.action_dataset' are empty and "
            "--prompts is not given"
        )
    encoder, start = T5TextEncoder(config.text, config.backbone.text_width, _DEVICE.value), time.perf_counter()
    lines = read_prompts(pathlib.Path(_PROMPTS.value)) if _PROMPTS.value else []
    prompts = [*(dict.fromkeys(lines) | find_instructions(config))]
    missing = sorted(encoder.missing(prompts), key=len)  # prompts of a batch are padded to its longest
    cached = len(prompts) - len(missing)
    print(f"{len(prompts)} prompts: {cached} are in {config.text.cache}, {len(missing)} to embed", flush=True)
    with progress(total=len(missing), desc="embedding", unit="prompt", hide=not missing) as bar:
        for first in range(0, len(missing), _BATCH_SIZE.value):
            batch = missing[first : first + _BATCH_SIZE.value]
            encoder.add(batch)
            bar.update(len(batch))
    print(f"embedded {len(missing)} prompts in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    experiment.run(main, (DatasetError,))
