"""From expert demonstrations to a policy that acts: every phase of the quickstart, in one command.

    python launch/quickstart.py [--out=runs/quickstart]

Collects Meta-World demonstrations, trains the video backbone, trains action decoders on it and, as an ablation, on an
untrained backbone, evaluates them on unseen seeds beside the scripted expert, and writes `results.json` and `report.html`
into the folder --out. Every phase is a command that is printed and can be run by itself. Interrupted at any point, the
same command continues: finished phases are kept and training resumes from its last checkpoint.
"""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import time

import experiment
from absl import flags

from mimic_video.evaluation.rollouts import wilson_interval
from mimic_video.runs.directory import write_json

_OUT = flags.DEFINE_string("out", None, "Where everything is written; runs/quickstart, or runs/smoke, unless given")
_SMOKE = flags.DEFINE_bool("smoke", False, "A few steps of every phase, to see that all of them run; no policy comes of it")

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.py"
BACKBONES = ("trained", "untrained")
SEEDS = (0, 1)  # of stage 2, for either backbone
EPISODES = {"videos": 100, "demonstrations": 20, "validation": 10}  # per task
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
    """One command of the quickstart; `seconds` is what it took on two quiet cores, to estimate what is left."""

    title: str
    seconds: float
    command: list[str]


def policy_run(work: pathlib.Path, backbone: str, seed: int) -> pathlib.Path:
    return work / f"action-{backbone}-{seed}"


def phases(work: pathlib.Path, smoke: bool) -> list[Phase]:
    """All phases in order."""
    settings: dict[str, object] = {
        "data.video_dataset": work / "data/videos/1.0.0",
        "data.action_dataset": work / "data/demonstrations/1.0.0",
    }
    settings |= SMOKE_SETTINGS if smoke else {}

    def script(name: str, stage: str, run: pathlib.Path, *extra: str, **more: object) -> list[str]:
        overrides = [f"--config.{field}={value}" for field, value in {**settings, **more}.items()]
        return [f"launch/{name}.py", f"--config={CONFIG}:{stage}", f"--workdir={run}", *overrides, *extra]

    counts = [f"--{name}={count}" for name, count in (SMOKE_EPISODES if smoke else EPISODES).items()]
    result = [
        Phase("collect demonstrations", 85, ["launch/collect.py", f"--config={CONFIG}", f"--out={work / 'data'}", *counts]),
        Phase("stage 1: train the video backbone", 200, script("train", "video", work / "video")),
        Phase("predict held-out video", 12, script("evaluate", "video", work / "video")),
    ]
    for backbone in BACKBONES:
        for seed in seeds(smoke):
            run, name = policy_run(work, backbone, seed), f"{backbone} backbone, seed {seed}"
            start = {"backbone_run": work / "video" if backbone == "trained" else "", "seed": seed}
            result.append(Phase(f"stage 2: train the action decoder ({name})", 150, script("train", "action", run, **start)))
            result.append(Phase(f"act in the simulator ({name})", 30, script("evaluate", "action", run, **start)))
    result.append(Phase("act in the simulator (scripted expert)", 10, script("evaluate", "action", work / "expert", "--expert")))
    policies = [
        f"--policy_run={backbone} backbone=" + ",".join(f'"{policy_run(work, backbone, seed)}"' for seed in seeds(smoke))
        for backbone in BACKBONES
    ]
    places = [f"--out={work / 'report.html'}", f"--video_run={work / 'video'}", f"--expert_run={work / 'expert'}"]
    result.append(Phase("write the report", 3, ["launch/report.py", *places, *policies]))
    return result


def seeds(smoke: bool) -> tuple[int, ...]:
    return SEEDS[:1] if smoke else SEEDS


def run_phases(work: pathlib.Path, smoke: bool) -> None:
    """Runs every phase that has not finished, saying how long is left at the pace so far."""
    record = work / "phases.json"  # [command, seconds] of each finished phase
    try:
        finished = json.loads(record.read_text()) if record.exists() else []
    except ValueError as error:
        sys.exit(f"error: {record} is damaged ({error}); without it the same command looks at every phase again")
    todo, expected = phases(work, smoke), 0.0
    for number, phase in enumerate(todo, start=1):
        spent = next((seconds for command, seconds in finished if command == phase.command), None)
        headline = f"[{number}/{len(todo)}] {phase.title}"
        if spent is not None:
            print(f"{headline}: done before, {spent:.0f} s", flush=True)
            expected += phase.seconds
            continue
        pace = sum(seconds for _, seconds in finished) / expected if expected else 1.0
        left = pace * sum(later.seconds for later in todo[number - 1 :])
        print(f"\n{headline}; about {left / 60:.0f} min left\n  python {shlex.join(phase.command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, *phase.command], cwd=ROOT, check=False).returncode
        if code:
            sys.exit(f"error: '{phase.title}' ended with code {code}; the same command continues from here")
        expected += phase.seconds
        finished.append([phase.command, time.perf_counter() - start])
        write_json(record, finished)


def summarise(work: pathlib.Path, smoke: bool) -> dict:
    """The content of results.json. Success pools the training seeds of a backbone."""

    def evaluation(run: pathlib.Path) -> dict:
        return json.loads((run / "evaluation.json").read_text())

    def pooled(backbone: str) -> dict:
        runs = [evaluation(policy_run(work, backbone, seed)) for seed in seeds(smoke)]
        successes, episodes = (sum(run["success"]["overall"][key] for run in runs) for key in ("successes", "episodes"))
        low, high = wilson_interval(successes, episodes)
        return {
            "success_rate": successes / episodes,
            "low": low,
            "high": high,
            "successes": successes,
            "episodes": episodes,
            "per_training_seed": [run["success"] for run in runs],
            "open_loop_rmse": [run["open_loop"]["rmse"] for run in runs],
        }

    results = {f"{backbone}_backbone": pooled(backbone) for backbone in BACKBONES}
    trained = results["trained_backbone"]
    return {
        "success_rate": trained["success_rate"],
        "unseen_seeds": trained["per_training_seed"][0]["overall"]["episodes"],
        **results,
        "scripted_expert": evaluation(work / "expert")["success"],
        "seconds": sum(seconds for _, seconds in json.loads((work / "phases.json").read_text())),
    }


def main() -> None:
    smoke = _SMOKE.value
    work = pathlib.Path(_OUT.value or ("runs/smoke" if smoke else "runs/quickstart")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    run_phases(work, smoke)
    results = summarise(work, smoke)
    write_json(work / "results.json", results)
    print(
        f"\nsuccess on unseen seeds: {results['success_rate']:.2f} with the trained backbone, "
        f"{results['untrained_backbone']['success_rate']:.2f} with an untrained one, "
        f"{results['scripted_expert']['overall']['rate']:.2f} by the scripted expert"
    )
    print(f"results: {work / 'results.json'}\nreport:  {work / 'report.html'}")


if __name__ == "__main__":
    experiment.run(main, config=False, compilation_cache=None)
