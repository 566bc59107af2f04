"""Evaluates the newest checkpoint of a run; writes `evaluation.json`, GIFs and PNGs into its directory, or into --out.

    python launch/evaluate.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action [--config.policy.stop_step=4]
    python launch/evaluate.py --config=configs/quickstart.py:video --workdir=runs/quickstart/video
    python launch/evaluate.py --config=configs/quickstart.py:action --workdir=runs/quickstart/expert --expert

Stage `action`: success over unseen seeds in the simulator, and open-loop action error on held-out demonstrations; without
`evaluation.tasks`, where there is no simulator, the latter alone.
Stage `video`: predicted against real video on held-out episodes. With --expert, the scripted expert drives the same seeds.

--rerun=FILE.rrd or --rerun=connect logs what --recorded keeps, and plans, to a recording of Rerun or its viewer: docs/rerun.md.
"""

import pathlib
import time

import experiment
import numpy as np
from absl import flags
from etils import epath

from data_pipelines.datasets import open_datasets
from data_pipelines.loader import WindowDataset
from data_pipelines.sources.rlds import DatasetError
from mimic_video import rerun_log
from mimic_video.config import ConfigError, ExperimentConfig, to_dict
from mimic_video.embodiments import of_dataset
from mimic_video.evaluation.offline import action_errors
from mimic_video.evaluation.rollouts import log_recordings, run_expert, run_rollouts, success_lines, summary, write_recordings
from mimic_video.evaluation.simulators import factories
from mimic_video.evaluation.video import evaluate_video
from mimic_video.policy.policy import Policy
from mimic_video.rerun_log import RerunLog
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.status import LOCKS, reported
from mimic_video.runs.storage import RunError, Spool, run_path

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write to, or gs://BUCKET/FOLDER; by default the run directory")
_EXPERT = flags.DEFINE_bool("expert", False, "Evaluate the scripted expert instead of a policy")
_RECORDED = flags.DEFINE_integer("recorded", 4, "Episodes per task, or video samples, kept as GIF", lower_bound=0)

_DATASET = flags.DEFINE_string("dataset", None, "Of a run on several datasets, the one to evaluate on, by its name")
_RERUN = flags.DEFINE_string("rerun", None, rerun_log.HELP)

_VIDEO_SAMPLES = 16


def chosen_windows(config: ExperimentConfig) -> WindowDataset:
    """Held-out windows of the dataset that --dataset names, or of the only one there is."""
    return open_datasets(config, config.data.validation_split).chosen(_DATASET.value)[1]


def of_video(config: ExperimentConfig, run: epath.Path, out: pathlib.Path, log: RerunLog | None) -> dict:
    params, step = checkpoints.load_params(run)
    windows = chosen_windows(config)
    chosen = [windows[int(i)] for i in np.linspace(0, len(windows) - 1, _VIDEO_SAMPLES)]
    return {"checkpoint_step": step, **evaluate_video(config, params, chosen, windows.cameras, out, _RECORDED.value, log)}


def of_policy(config: ExperimentConfig, run: epath.Path, out: pathlib.Path, log: RerunLog | None) -> dict:
    directory.require_same_model(directory.read_config(run), config, run, "window", "tokenizer", "backbone", "decoder")
    windows = chosen_windows(config)
    robot = _DATASET.value and of_dataset(directory.load_embodiments(run), _DATASET.value).name
    policy = Policy.load(run, config, robot)
    samples = [windows[index] for index in range(0, len(windows), 4)]
    open_loop = action_errors(policy, samples, config.data.past_frames, policy.normalizers["action"])
    print(f"held-out actions: error of {open_loop['rmse']:.3f} in normalised units, over {open_loop['windows']} windows")
    if not config.evaluation.tasks:
        return {"open_loop": open_loop}
    results = run_rollouts(policy, factories(config, policy.embodiment.cameras), config, record=_RECORDED.value)
    write_recordings(results, out / "rollouts", config.data.control_hz)
    if log is not None:
        log_recordings(log, results, config)
    return {"open_loop": open_loop, **summary(results)}


def of_expert(config: ExperimentConfig, *_: object) -> dict:
    return summary(run_expert(factories(config), config))


def main(config: ExperimentConfig) -> None:
    run, start = run_path(_WORKDIR.value), time.perf_counter()
    out = run_path(_OUT.value) if _OUT.value else run
    evaluate = of_expert if _EXPERT.value else {"video": of_video, "action": of_policy}[config.stage]
    if _EXPERT.value and _RERUN.value:
        raise ConfigError("--rerun is of a policy or a video model; expected it without --expert, which records nothing")
    logging = rerun_log.opened(_RERUN.value, "mimic-video evaluation")
    with logging as log, directory.locked(out, LOCKS["evaluation"]), reported(out, "evaluation"), Spool(out) as spool:
        values = evaluate(config, run, spool.path, log)
        spool.path.mkdir(parents=True, exist_ok=True)
        settings = {"policy": to_dict(config.policy), "evaluation": to_dict(config.evaluation)}
        directory.write_json(spool.path / "evaluation.json", values | settings | {"seconds": time.perf_counter() - start})
    for line in success_lines(values.get("success", {})):
        print(line)


if __name__ == "__main__":
    experiment.run(main, (DatasetError, RunError))
