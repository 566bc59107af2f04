"""Evaluates the newest checkpoint of a run; writes `evaluation.json`, GIFs and PNGs into its directory.

    python launch/evaluate.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action [--config.policy.stop_step=4]
    python launch/evaluate.py --config=configs/quickstart.py:video --workdir=runs/quickstart/video
    python launch/evaluate.py --config=configs/quickstart.py:action --workdir=runs/quickstart/expert --expert

Stage `action`: success over unseen seeds in the simulator, and open-loop action error on held-out demonstrations.
Stage `video`: predicted against real video on held-out episodes. With --expert, the scripted expert drives the same seeds.
"""

import dataclasses
import functools
import pathlib
import time

import experiment
import jax
import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from data_pipelines.datasets import open_datasets
from data_pipelines.loader import WindowDataset
from data_pipelines.sources.metaworld import expert_steps
from data_pipelines.sources.rlds import DatasetError
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.evaluation.metaworld import MetaworldFactory
from mimic_video.evaluation.offline import action_errors, psnr
from mimic_video.evaluation.rollouts import EpisodeResult, run_rollouts, success_table
from mimic_video.media import film_strip, write_video
from mimic_video.models.text import make_text_encoder
from mimic_video.policy.policy import Policy
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, Spool, run_path
from mimic_video.vam import VideoActionModel

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory", required=True)
_EXPERT = flags.DEFINE_bool("expert", False, "Evaluate the scripted expert instead of a policy")
_RECORDED = flags.DEFINE_integer("recorded", 4, "Episodes per task, or video samples, kept as GIF", lower_bound=0)

_DATASET = flags.DEFINE_string("dataset", None, "Of a run on several datasets, the one to evaluate on, by its name")

_VIDEO_SAMPLES = 16
_POLICY_FIELDS = ("data.image_size", "data.past_frames", "data.future_frames", *directory.MODEL_FIELDS, "decoder")


def chosen_windows(config: ExperimentConfig) -> WindowDataset:
    """Held-out windows of the dataset that --dataset names, or of the only one there is."""
    datasets = open_datasets(config, config.data.validation_split).windows
    if _DATASET.value is None and len(datasets) == 1:
        return next(iter(datasets.values()))
    if _DATASET.value not in datasets:
        raise ConfigError(f"--dataset is {_DATASET.value!r}; expected one of {', '.join(map(repr, datasets))}")
    return datasets[_DATASET.value]


def evaluate_video(config: ExperimentConfig, run: epath.Path, out: pathlib.Path) -> dict:
    """Predictions of held-out futures, beside repeating the last observed frame."""
    params, step = checkpoints.load_params(run)
    vam, past = VideoActionModel(config), config.data.past_frames
    windows = chosen_windows(config)
    chosen = [windows[int(i)] for i in np.linspace(0, len(windows) - 1, _VIDEO_SAMPLES)]
    real = np.stack([window["video"] for window in chosen])
    encode_text = make_text_encoder(config.text)
    text = np.stack([encode_text(window["instruction"]) for window in chosen])
    noise = vam.policy_noise(config.seed, len(chosen))["video"]
    views = np.isin(config.data.cameras, windows.cameras)
    view_mask = np.tile(views, (len(chosen), 1)) if len(views) > 1 else None
    predicted = np.asarray(jax.jit(vam.sample_video)(params, real[:, :past], text, noise, view_mask=view_mask))
    rows = np.repeat(views, config.data.image_size[0])
    real, predicted = real[:, :, rows], predicted[:, :, rows]
    mask = np.stack([window["video_mask"] for window in chosen])[:, past:]
    repeated = np.repeat(real[:, past - 1 : past], config.data.future_frames, axis=1)
    for i in range(min(_RECORDED.value, len(chosen))):
        write_video(out / "videos" / f"{i:02d}.gif", np.concatenate([real[i], predicted[i]], axis=2), config.data.video_hz / 2)
    strip = Image.fromarray(film_strip(real[:4, past - 1 :: 3], predicted[:4, past - 1 :: 3]))
    (out / "videos").mkdir(exist_ok=True)
    strip.resize((strip.width * 2, strip.height * 2), Image.Resampling.NEAREST).save(out / "videos" / "strip.png")
    return {
        "checkpoint_step": step,
        "psnr": psnr(predicted[:, past:], real[:, past:], mask).tolist(),
        "psnr_last_frame_repeated": psnr(repeated, real[:, past:], mask).tolist(),
        "samples": [window["instruction"] for window in chosen],
    }


def evaluate_policy(config: ExperimentConfig, run: epath.Path, out: pathlib.Path) -> dict:
    directory.require_same_model(directory.read_config(run), config, _POLICY_FIELDS, run)
    policy = Policy.load(run, config, _DATASET.value)
    windows = chosen_windows(config)
    samples = [windows[index] for index in range(0, len(windows), 4)]
    open_loop = action_errors(policy, samples, config.data.past_frames, policy.normalizers["action"])
    factory = functools.partial(
        MetaworldFactory, image_size=config.data.image_size, layout=config.evaluation.layout, cameras=config.data.cameras
    )
    results = run_rollouts(policy, factory, config, record=_RECORDED.value)
    for result in results:
        if result.frames is not None:
            outcome = "success" if result.success else "failure"
            write_video(out / "rollouts" / f"{result.task}_{result.seed}_{outcome}.gif", result.frames, config.data.control_hz)
    return {"open_loop": open_loop, **closed_loop(results, config)}


def evaluate_expert(config: ExperimentConfig) -> dict:
    """The ceiling: the expert that gave the demonstrations, without noise, under the same step limit."""
    evaluation, results = config.evaluation, []
    for task in evaluation.tasks:
        factory = MetaworldFactory(task, config.data.image_size, config.evaluation.layout)
        for seed in range(evaluation.first_seed, evaluation.first_seed + evaluation.episodes_per_task):
            steps = expert_steps(factory, seed, evaluation.max_steps)
            results.append(EpisodeResult(task, seed, steps is not None, steps or evaluation.max_steps))
    return closed_loop(results, config)


def closed_loop(results: list[EpisodeResult], config: ExperimentConfig) -> dict:
    episodes = [{"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps} for r in results]
    return {"success": success_table(results), "episodes": episodes, "policy": dataclasses.asdict(config.policy)}


def main(config: ExperimentConfig) -> None:
    run, start = run_path(_WORKDIR.value), time.perf_counter()
    with Spool(run) as spool:
        if _EXPERT.value:
            values = evaluate_expert(config)
        else:
            values = {"video": evaluate_video, "action": evaluate_policy}[config.stage](config, run, spool.path)
        spool.path.mkdir(parents=True, exist_ok=True)
        directory.write_json(spool.path / "evaluation.json", values | {"seconds": time.perf_counter() - start})
    for task, row in values.get("success", {}).items():
        interval = f"95 % interval {row['low']:.2f} to {row['high']:.2f}"
        print(f"{task}: {row['successes']}/{row['episodes']} = {row['rate']:.2f}, {interval}")


if __name__ == "__main__":
    experiment.run(main, (DatasetError, RunError))
