"""Looks for what is wrong with a run, its data, or both; writes one HTML page and says in words what was found.

    python launch/doctor.py --run=runs/quickstart/action
    python launch/doctor.py --run=runs/quickstart/action --source=/data/new_recordings/1.0.0 --split=train --out=doctor.html

Recordings are those that the run was validated on, or of --source, another prepared dataset of the same robot. Of a run of stage
`action` that is: its policy on them, against simple baselines and with inputs exchanged, its video model, its statistics, and
what actions and states say of each other; of a run of stage `video`, its predictions. Symptoms, findings and remedies are in
docs/doctor.md. Exit codes: 0 nothing found, 2 something is wrong, 1 an error.
"""

import dataclasses
import pathlib
import runpy
import sys
from typing import Any

import experiment
import jax
from absl import flags

from data_pipelines.assembly import find_embodiments
from data_pipelines.datasets import open_datasets
from data_pipelines.examined import examined_windows, recordings
from data_pipelines.loader import WindowDataset
from data_pipelines.sources.rlds import DatasetError
from mimic_video.config import ExperimentConfig
from mimic_video.embodiments import of_dataset
from mimic_video.evaluation import findings, probes
from mimic_video.evaluation.doctor_page import Examination, write_page
from mimic_video.evaluation.recordings import response
from mimic_video.policy.policy import Policy
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.storage import RunError, in_bucket, run_path

_RUN = flags.DEFINE_string("run", None, "Run directory of stage `action` or `video`", required=True)
_OUT = flags.DEFINE_string("out", None, "HTML file to write; by default doctor.html in the run directory")
_SOURCE = flags.DEFINE_string("source", None, "Prepared dataset to look at in place of the run's own, .../NAME/VERSION")
_SPLIT = flags.DEFINE_string("split", None, "Split to look at; by default 'data.validation_split' of the run")
_DATASET = flags.DEFINE_string("dataset", None, "Of a run on several datasets, the one to look at, by its name")
_REGISTER = flags.DEFINE_string("register", None, "Python file that registers a dataset, such as configs/my_robot.py")
_EPISODES = flags.DEFINE_integer("episodes", 32, "Episodes, spread over the split, that are looked at", lower_bound=2)
_WINDOWS = flags.DEFINE_integer("windows", 6, "Windows of each episode, at most", lower_bound=1)

_REPEATS = 20  # plans whose time is taken


def chosen_dataset(config: ExperimentConfig) -> tuple[str, WindowDataset]:
    """The dataset that is looked at, by its name."""
    split = _SPLIT.value or config.data.validation_split
    if _SOURCE.value:
        source: dict[str, Any] = {f"{config.stage}_dataset": _SOURCE.value, "robots": ()}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **source))
        (found,) = open_datasets(config, split).windows.items()
        return found
    return open_datasets(config, split).chosen(_DATASET.value)


def of_policy(config: ExperimentConfig, examination: Examination) -> Examination:
    run, (name, windows) = run_path(_RUN.value), chosen_dataset(config)
    robot = _DATASET.value and of_dataset(directory.load_embodiments(run), _DATASET.value).name
    policy = Policy.load(run, config, robot)
    stored, scale = policy.embodiment.statistics, policy.normalizers["action"].scale
    looked_at = examined_windows(windows, config.data, _EPISODES.value, _WINDOWS.value)
    actions, missing = probes.measure_actions(policy, looked_at, windows.cameras)
    flow_times = probes.measure_flow_times(policy, looked_at)
    if len({window["episode"] for window in looked_at}) < 2:
        raise DatasetError(f"{name} has one episode to look at; expected two or more, since intervals are over episodes")
    firsts = [
        window
        for window, last in zip(looked_at, [None, *looked_at], strict=False)
        if not last or last["episode"] != window["episode"]
    ]
    video, _ = probes.measure_video(policy.config, policy.params, firsts, windows.cameras, inputs=False)
    latency = probes.measure_latency(policy, looked_at[0], _REPEATS)
    recorded = recordings(windows, config.data)

    baselines = findings.judge_baselines(actions, scale)
    device = jax.devices()[0].device_kind
    found = [  # causes before what follows from them
        *of_statistics(config, policy, recorded),
        findings.judge_constants(stored, recorded),
        findings.judge_round_trip(policy.normalizers["action"], actions.recorded, actions.mask),
        *findings.judge_response(response(recorded), windows.control_hz),
        findings.judge_cameras(actions, scale),
        findings.judge_rate(actions, scale),
        findings.judge_mirrored(actions, stored["action"].two_valued),
        *findings.judge_inputs(actions, scale, missing, predicts=baselines[0].level != "fault"),
        *baselines,
        findings.judge_video_rate(video),
        findings.judge_video(video, config.data.video_hz),
        findings.judge_flow_time(flow_times),
        findings.judge_latency(
            latency["p50_ms"], latency["p95_ms"], config.policy, config.data.control_hz, config.data.action_horizon, device
        ),
    ]
    return dataclasses.replace(examination, findings=found, actions=actions, scale=scale, flow_times=flow_times, video=video)


def of_statistics(config: ExperimentConfig, policy: Policy, recorded: list) -> list[findings.Finding]:
    """What needs the training data, too."""
    robot, stored = policy.embodiment, policy.embodiment.statistics
    try:
        training = open_datasets(config, config.data.train_split).windows
    except DatasetError as error:
        if not _SOURCE.value:
            raise
        return [findings.Finding("statistics", "doubt", f"not compared, since the run's training data cannot be read: {error}")]
    own = {name: each for name, each in training.items() if name in (robot.datasets or (robot.name,))}
    there = [each for windows in own.values() for each in recordings(windows, config.data)]
    (again,) = [each for each in find_embodiments(training, config.data).values() if each.name == robot.name]
    deviations = {key: stored[key].std[0] for key in ("action", "proprio")}
    return [
        findings.judge_statistics(stored, again.statistics),
        findings.judge_new_data(there, recorded, deviations),
        findings.judge_ranges(stored, recorded, len(there)),
    ]


def of_video(config: ExperimentConfig, examination: Examination) -> Examination:
    params, _ = checkpoints.load_params(run_path(_RUN.value))
    _, windows = chosen_dataset(config)
    looked_at = examined_windows(windows, config.data, _EPISODES.value, 1)
    video, missing = probes.measure_video(config, params, looked_at, windows.cameras, inputs=True)
    found = [
        findings.judge_video(video, config.data.video_hz),
        findings.judge_video_rate(video),
        findings.judge_video_prompt(video, missing),
        findings.judge_video_cameras(video),
    ]
    return dataclasses.replace(examination, findings=found, video=video)


def main() -> None:
    run = run_path(_RUN.value)
    if _OUT.value is None and in_bucket(run):
        raise RunError(f"--run is {run}, a bucket, where no page is written; expected --out=FILE.html, too")
    out = pathlib.Path(_OUT.value or f"{run}/doctor.html")
    if _REGISTER.value:
        runpy.run_path(_REGISTER.value)
    config = directory.read_config(run)
    examination = Examination(str(run), config, _SOURCE.value or "the run's own data")
    examination = {"video": of_video, "action": of_policy}[config.stage](config, examination)
    write_page(out, examination)
    for finding in examination.by_weight:
        print(f"{finding.level:5}  {finding.check}: {finding.seen}" + (f"\n       → {finding.advice}" if finding.advice else ""))
    print(f"wrote {out}")
    if examination.faults:
        sys.exit(2)


if __name__ == "__main__":
    experiment.run(main, (DatasetError, RunError, ModuleNotFoundError), config=False)
