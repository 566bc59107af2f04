"""From expert demonstrations to a policy that acts: every phase of the quickstart, in one command.

    python launch/quickstart.py [--out=runs/quickstart] [--ablation]

Collects Meta-World demonstrations, trains the video backbone and an action decoder on it, evaluates the policy on unseen seeds
beside the scripted expert, and writes `results.json` and `report.html` into the folder --out. --ablation asks what the backbone
is good for: it adds a second seed, and decoders on an untrained backbone. Every phase is a command that is printed and can be run
by itself. Interrupted at any point, the same command continues: finished phases are kept and training resumes from its last
checkpoint. --ablation goes on from what there is without it.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import threading
import time

import experiment
from absl import flags

from mimic_video.evaluation.rollouts import wilson_interval
from mimic_video.runs.directory import write_json

_OUT = flags.DEFINE_string("out", None, "Where everything is written; runs/quickstart, or runs/smoke, unless given")
_ABLATION = flags.DEFINE_bool("ablation", False, "Two seeds of stage 2, and as many on an untrained backbone")
_SMOKE = flags.DEFINE_bool("smoke", False, "A few steps of every phase, to see that all of them run; no policy comes of it")

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.py"
SEEDS = (0, 1)  # of stage 2 in the ablation, for either backbone
EPISODES = {"videos": 80, "demonstrations": 20, "validation": 10}  # per task
SMOKE_EPISODES = {"videos": 3, "demonstrations": 2, "validation": 1}
SMOKE_SETTINGS = {
    "train.steps": 6,
    "train.warmup_steps": 2,
    "train.log_every": 2,
    "train.validate_every": 3,
    "train.checkpoint_every": 3,
    "tokenizer.fit_windows": 32,
    "evaluation.episodes_per_task": 2,
    "evaluation.max_steps": 6,
    "policy.video_steps": 4,
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """One command of the quickstart.

    Attributes:
        seconds: what it took on two quiet cores, to estimate what is left.
        beside: the file that it prints into, of a phase that runs beside those after it, whose networks are so small that their
            steps keep little more than one core busy.
        needs: titles of phases beside others that it waits for.
    """

    title: str
    seconds: float
    command: list[str]
    beside: pathlib.Path | None = None
    needs: tuple[str, ...] = ()

    def run(self) -> float:
        """Returns its seconds, or ends the process with its name."""
        start = time.perf_counter()
        with self.beside.open("w") if self.beside else contextlib.nullcontext() as output:
            done = subprocess.run([sys.executable, *self.command], cwd=ROOT, check=False, stdout=output, stderr=output)
        if done.returncode:
            told = f", as {self.beside} explains" if self.beside else ""
            sys.exit(f"error: '{self.title}' ended with code {done.returncode}{told}; the same command continues from here")
        return time.perf_counter() - start


def decoders(work: pathlib.Path, ablation: bool) -> dict[str, list[pathlib.Path]]:
    """Backbone → runs of stage 2 on it, one for each seed."""
    if not ablation:
        return {"trained": [work / "action"]}
    return {
        "trained": [work / "action", *(work / f"action-{seed}" for seed in SEEDS[1:])],
        "untrained": [work / f"action-untrained-{seed}" for seed in SEEDS],
    }


def phases(work: pathlib.Path, smoke: bool, ablation: bool) -> list[Phase]:
    """All phases in order."""
    settings: dict[str, object] = {
        "data.video_dataset": work / "data/videos/1.0.0",
        "data.action_dataset": work / "data/demonstrations/1.0.0",
    }
    settings |= SMOKE_SETTINGS if smoke else {}

    def script(name: str, stage: str, run: pathlib.Path, *extra: str, **more: object) -> list[str]:
        overrides = [f"--config.{field}={value}" for field, value in {**settings, **more}.items()]
        return [f"launch/{name}.py", f"--config={CONFIG}:{stage}", f"--workdir={run}", *overrides, *extra]

    def collect(dataset: str, *extra: str) -> list[str]:
        counts = [f"--{name}={count}" for name, count in (SMOKE_EPISODES if smoke else EPISODES).items()]
        return ["launch/collect.py", f"--config={CONFIG}", f"--out={work / 'data'}", f"--datasets={dataset}", *counts, *extra]

    one_core = "--config.evaluation.workers=1"
    demonstrations, expert, predict = "collect demonstrations", "act in the simulator (scripted expert)", "predict held-out video"
    result = [
        Phase("collect videos", 40, collect("videos")),
        Phase(demonstrations, 35, collect("demonstrations", one_core), work / "demonstrations.txt"),
        Phase(expert, 17, script("evaluate", "action", work / "expert", "--expert", one_core), work / "expert.txt"),
        Phase("stage 1: train the video backbone", 95, script("train", "video", work / "video")),
        Phase(predict, 14, script("evaluate", "video", work / "video"), work / "predict.txt"),
    ]
    arms = decoders(work, ablation)
    for backbone, runs in arms.items():
        for seed, run in zip(SEEDS, runs, strict=False):
            name = f" ({backbone} backbone, seed {seed})" if ablation else ""
            start = {"backbone_run": work / "video" if backbone == "trained" else "", "seed": seed}
            train = script("train", "action", run, **start)
            result.append(Phase(f"stage 2: train the action decoder{name}", 130, train, needs=(demonstrations,)))
            result.append(Phase(f"act in the simulator{name}", 40, script("evaluate", "action", run, **start)))
    policies = [f"--policy_run={name} backbone=" + ",".join(f'"{run}"' for run in runs) for name, runs in arms.items()]
    places = [f"--out={work / 'report.html'}", f"--video_run={work / 'video'}", f"--expert_run={work / 'expert'}"]
    result.append(Phase("write the report", 4, ["launch/report.py", *places, *policies], needs=(expert, predict)))
    return result


def run_phases(todo: list[Phase], work: pathlib.Path) -> list[tuple[Phase, float]]:
    """Runs every phase that has not finished, saying how long is left at the pace so far. Returns the seconds of each."""
    record, recording = work / "phases.json", threading.Lock()  # [command, seconds] of each finished phase
    try:
        finished = json.loads(record.read_text()) if record.exists() else []
    except ValueError as error:
        sys.exit(f"error: {record} is damaged ({error}); without it the same command looks at every phase again")

    def seconds_of(phase: Phase) -> float | None:
        return next((seconds for command, seconds in finished if command == phase.command), None)

    def run(phase: Phase) -> None:
        seconds = phase.run()
        with recording:
            finished.append([phase.command, seconds])
            write_json(record, finished)

    expected, spent = 0.0, 0.0
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as second_core:
        started: dict[str, concurrent.futures.Future[None]] = {}
        for number, phase in enumerate(todo, start=1):
            headline, command = f"[{number}/{len(todo)}] {phase.title}", f"  python {shlex.join(phase.command)}"
            if (before := seconds_of(phase)) is not None:
                print(f"{headline}: done before, {before:.0f} s", flush=True)
            elif phase.beside:
                print(f"\n{headline}, beside what follows\n{command} >{phase.beside}", flush=True)
                started[phase.title] = second_core.submit(run, phase)
            else:
                pace = spent / expected if expected else 1.0
                left = pace * sum(later.seconds for later in todo[number - 1 :] if not later.beside)
                print(f"\n{headline}; about {left / 60:.0f} min left\n{command}", flush=True)
                for other in started.keys() & phase.needs:
                    started[other].result()
                run(phase)
            if not phase.beside:
                expected, spent = expected + phase.seconds, spent + (seconds_of(phase) or 0.0)
    return [(phase, seconds_of(phase) or 0.0) for phase in todo]


def summarise(work: pathlib.Path, ablation: bool, times: list[tuple[Phase, float]]) -> dict:
    """The content of results.json. Success pools the training seeds of a backbone."""

    def evaluation(run: pathlib.Path) -> dict:
        return json.loads((run / "evaluation.json").read_text())

    def pooled(runs: list[pathlib.Path]) -> dict:
        evaluations = [evaluation(run) for run in runs]
        successes, episodes = (sum(each["success"]["overall"][key] for each in evaluations) for key in ("successes", "episodes"))
        low, high = wilson_interval(successes, episodes)
        return {
            "success_rate": successes / episodes,
            "low": low,
            "high": high,
            "successes": successes,
            "episodes": episodes,
            "per_training_seed": [each["success"] for each in evaluations],
            "open_loop_rmse": [each["open_loop"]["rmse"] for each in evaluations],
        }

    results = {f"{backbone}_backbone": pooled(runs) for backbone, runs in decoders(work, ablation).items()}
    trained = results["trained_backbone"]
    return {
        "success_rate": trained["success_rate"],
        "unseen_seeds": trained["per_training_seed"][0]["overall"]["episodes"],
        **results,
        "scripted_expert": evaluation(work / "expert")["success"],
        "seconds": sum(seconds for phase, seconds in times if not phase.beside),
        "phases": [{"phase": phase.title, "seconds": seconds, "beside": bool(phase.beside)} for phase, seconds in times],
    }


def main() -> None:
    smoke, ablation = _SMOKE.value, _ABLATION.value
    work = pathlib.Path(_OUT.value or ("runs/smoke" if smoke else "runs/quickstart")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    times = run_phases(phases(work, smoke, ablation), work)
    results = summarise(work, ablation, times)
    write_json(work / "results.json", results)
    print("\nwhere the time went:")
    for phase, seconds in times:
        print(f"{seconds:6.0f} s  {phase.title}{', beside others' if phase.beside else ''}")
    print(f"{results['seconds']:6.0f} s  all")
    untrained = f"{results['untrained_backbone']['success_rate']:.2f} with an untrained one, " if ablation else ""
    print(
        f"\nsuccess on unseen seeds: {results['success_rate']:.2f} with the trained backbone, {untrained}"
        f"{results['scripted_expert']['overall']['rate']:.2f} by the scripted expert"
    )
    print(f"results: {work / 'results.json'}\nreport:  {work / 'report.html'}")


if __name__ == "__main__":
    experiment.run(main, config=False, compilation_cache=None)
