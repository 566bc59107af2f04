"""Made-up sweeps: directories of runs in the formats that training and evaluation write, without either."""

import contextlib
import json

from mimic_video.evaluation.rollouts import EpisodeResult, summary
from mimic_video.evaluation.sweep_results import Entry, save_entries
from mimic_video.runs.directory import write_json
from mimic_video.runs.status import reported
from mimic_video.training.preemption import PreemptedError

STEPS = 40


def sweep(workdir, points):
    """sweep.json of points, {values}; gives their entries."""
    entries = []
    for values in points:
        name = ",".join(f"{field.rpartition('.')[2]}={value}" for field, value in values.items()) or "base"
        entries.append(Entry(name, values, name, name))
    save_entries(workdir, entries)
    return entries


def train(run, validation=(), error=None, stage="action", **metrics):
    """A run with a record every 10 steps, as many as there are validation errors; it ends by `error`, if there is one."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "loss": 50.0 / step, f"{stage}_mse": 5.0 / step, f"validation_{stage}_mse": value, **metrics}
        for step, value in zip(range(10, STEPS + 1, 10), validation, strict=False)
    ]
    ending = contextlib.suppress(type(error)) if error else contextlib.nullcontext()
    with ending, reported(run, "training", STEPS, (PreemptedError,)) as progress:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        progress(10 * len(lines))
        if error:
            raise error


def evaluate(out, successes, episodes=8, **values):
    """What launch/evaluate.py writes for stage `action`: a run with so many successes."""
    out.mkdir(parents=True, exist_ok=True)
    with reported(out, "evaluation"):
        results = [EpisodeResult("drawer-open-v3", 1000 + i, i < successes, 7 + i) for i in range(episodes)]
        open_loop = {"rmse": 0.5, "rmse_per_step": [0.4, 0.6], "example": {"recorded": [[0.0]], "planned": [[0.1]]}}
        written = {"open_loop": open_loop, **summary(results), "policy": {"stop_step": 4}, "seconds": 1.0}
        write_json(out / "evaluation.json", written | values)


def kill(run, activity="training"):
    """Leaves the status of a process that ended without a word."""
    with reported(run, activity, STEPS):
        text = (run / "status.json").read_text()
    (run / "status.json").write_text(text)
