"""One self-contained HTML page about a video run and the policies trained on it.

Every number and every conclusion on the page is computed from the files of the run directories.
"""

import dataclasses
import html
import importlib.metadata
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimic_video.config import ExperimentConfig, to_dict
from mimic_video.evaluation import page
from mimic_video.evaluation.rollouts import wilson_interval
from mimic_video.media import matplotlib_figure
from mimic_video.runs.directory import read_config, read_metrics
from mimic_video.runs.storage import RunError

_EXPERT = "scripted expert"  # its row in tables and plots
_TRACE_WINDOWS, _TRACE_DIMS = 120, 8  # shown of the recorded and planned actions
_EXPECTED_TO_DIFFER = ("seed", "backbone_run", "mesh.", "evaluation.")  # between the policies that are compared


@dataclasses.dataclass(frozen=True)
class _Run:
    path: Path
    config: ExperimentConfig
    metrics: list[dict[str, float]]
    evaluation: dict[str, Any]


def write_report(path: Path, *, title: str, video_run: Path, policies: Mapping[str, Sequence[Path]], expert: Path | None) -> None:
    """Writes the page to `path` and its plots to `figures/` beside it.

    Args:
        title: heading of the page.
        video_run: the stage `video` run; evaluated.
        policies: label → evaluated stage `action` runs that differ in their training seed. The first label is compared with
            each of the others.
        expert: directory of the scripted expert's evaluation.json, on the same episodes.

    Raises:
        RunError: naming the file that is missing or does not belong in this comparison.
        ModuleNotFoundError: without matplotlib.
    """
    matplotlib_figure()
    video = _read_run(Path(video_run), "video", "psnr", "psnr_last_frame_repeated", "samples", "checkpoint_step")
    arms = {
        label: [_read_run(Path(run), "action", "success", "episodes", "open_loop", "policy") for run in runs]
        for label, runs in policies.items()
    }
    if not arms or not all(arms.values()):
        raise RunError("a report needs at least one policy, and a run directory for each of its labels")
    ceiling = None if expert is None else _read_evaluation(Path(expert), "success", "episodes")
    _check_same_episodes(arms, ceiling, expert)
    figures = path.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            _summary(arms, ceiling, video, figures),
            _training(arms, video, figures),
            _video(video, figures),
            _open_loop(arms, figures),
            _rollouts(arms),
            _provenance(arms, video, expert, path),
        ]
    )
    path.write_text(page.document(title, body), encoding="utf-8")


# Reading.


def _read_evaluation(directory: Path, *required: str) -> dict[str, Any]:
    path = directory / "evaluation.json"
    if not path.exists():
        raise RunError(f"{path} does not exist: run launch/evaluate.py on that directory first")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; run launch/evaluate.py on that directory again") from error
    for name in required:
        if name not in values:
            raise RunError(f"{path} has no entry '{name}': it is not an evaluation of the kind expected here")
    return values


def _read_run(directory: Path, stage: str, *required: str) -> _Run:
    config, metrics = read_config(directory), read_metrics(directory)
    if config.stage != stage:
        raise RunError(f"{directory / 'config.json'} is of stage '{config.stage}'; expected stage '{stage}'")
    if not metrics:
        raise RunError(f"{directory / 'metrics.jsonl'} holds no training metrics")
    return _Run(directory, config, metrics, _read_evaluation(directory, *required))


def _check_same_episodes(arms: Mapping[str, list[_Run]], ceiling: dict | None, expert: Path | None) -> None:
    """Rates are comparable only on the same starts, and errors only on the same recordings."""
    runs = _all_runs(arms)
    evaluated = [(run.path, run.evaluation) for run in runs]
    if ceiling is not None and expert is not None:
        evaluated.append((Path(expert), ceiling))
    episodes = [{(e["task"], e["seed"]) for e in evaluation["episodes"]} for _, evaluation in evaluated]
    for (directory, _), seen in zip(evaluated, episodes, strict=True):
        if seen != episodes[0]:
            raise RunError(f"{directory / 'evaluation.json'} is of other tasks or seeds than {runs[0].path / 'evaluation.json'}")
    for run in runs:
        if run.evaluation["open_loop"]["example"]["recorded"] != runs[0].evaluation["open_loop"]["example"]["recorded"]:
            raise RunError(f"{run.path / 'evaluation.json'} is of other recordings than {runs[0].path / 'evaluation.json'}")


def _all_runs(arms: Mapping[str, list[_Run]]) -> list[_Run]:
    return [run for runs in arms.values() for run in runs]


# Conclusions.


def difference_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float, float]:
    """Difference of two success rates, each (successes, episodes), and its 95 % interval by Newcombe's hybrid score method."""
    p, q = first[0] / first[1], second[0] / second[1]
    (p_low, p_high), (q_low, q_high) = wilson_interval(*first), wilson_interval(*second)
    return p - q, p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def success_verdict(first: str, a: Sequence[Mapping], second: str, b: Sequence[Mapping]) -> tuple[str, str, str]:
    """Whether success with `first` exceeds that with `second`: "yes", "no" or "open"; the same in words; the evidence.

    Args:
        a, b: rows of the success table, one per training run.
    """
    difference, low, high = difference_interval(_pool(a), _pool(b))
    evidence = (
        f"{_count(_pool(a))} episodes succeed with {first}, {_count(_pool(b))} with {second}: a difference of "
        f"{100 * difference:+.1f} percentage points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}. "
        "The interval covers the choice of episodes, not that of training seeds."
    )
    if low <= 0 <= high:
        return "open", "Not settled: the 95 % interval of the difference in success includes zero.", evidence
    kind, word = ("yes", "higher") if low > 0 else ("no", "lower")
    if min(len(a), len(b)) == 1:
        caution = "but training seeds were not repeated on both sides"
        return kind, f"{kind.title()}, for these runs: success is {word} with {first}, {caution}.", evidence
    if _overlap([row["rate"] for row in a], [row["rate"] for row in b]):
        return "open", f"Not settled: success is {word} with {first} over all episodes, but training runs overlap.", evidence
    return kind, f"{kind.title()}: success is {word} in each run with {first} than in any with {second}.", evidence


def error_verdict(first: str, a: Sequence[float], second: str, b: Sequence[float]) -> str:
    """How the held-out action error with `first` compares with that with `second`; one value per training run."""
    change = statistics.mean(a) / statistics.mean(b) - 1
    text = f"Held-out action error is {_spread(a)} with {first} and {_spread(b)} with {second}: "
    text += f"{100 * abs(change):.1f} % {(word := 'lower' if change < 0 else 'higher')} with {first}"
    if min(len(a), len(b)) == 1:
        return text + "; training seeds were not repeated on both sides."
    return text + ("; training runs overlap." if _overlap(a, b) else f", and {word} in each run than in any with {second}.")


def video_verdict(model: Sequence[float], copying: Sequence[float]) -> str:
    """How predicted frames compare with repeating the last observed one, from PSNR per future frame."""
    better = sum(m > c for m, c in zip(model, copying, strict=True))
    return (
        f"Predicted video is closer to the real one than the repeated last frame is, at {better} of {len(model)} future "
        f"frames; averaged over them, PSNR is {statistics.mean(model):.1f} dB against {statistics.mean(copying):.1f} dB."
    )


def _pool(rows: Iterable[Mapping]) -> tuple[int, int]:
    rows = list(rows)
    return sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return min(a) <= max(b) and min(b) <= max(a)


def _other_differences(arms: Mapping[str, list[_Run]]) -> list[str]:
    """Settings, beyond training seed and backbone, in which the compared policies differ."""
    settings = [dict(_flat(to_dict(run.config) | {"policy": run.evaluation["policy"]})) for run in _all_runs(arms)]
    return [
        name
        for name, value in settings[0].items()
        if not name.startswith(_EXPECTED_TO_DIFFER) and any(other.get(name) != value for other in settings)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]


# Sections.


def _summary(arms: Mapping[str, list[_Run]], ceiling: dict | None, video: _Run, figures: Path) -> str:
    rows = {label: [run.evaluation["success"] for run in runs] for label, runs in arms.items()}
    errors = {label: [run.evaluation["open_loop"]["rmse"] for run in runs] for label, runs in arms.items()}
    first, *others = arms
    parts = []
    for other in others:
        ablation = all(run.config.backbone_run for run in arms[first]) and not any(run.config.backbone_run for run in arms[other])
        question = "Does video pretraining help?" if ablation else f"Is success higher with {first} than with {other}?"
        overall = [[table["overall"] for table in rows[label]] for label in (first, other)]
        kind, answer, evidence = success_verdict(first, overall[0], other, overall[1])
        lines = [evidence, error_verdict(first, errors[first], other, errors[other])]
        if confounders := _other_differences({label: arms[label] for label in (first, other)}):
            lines.append(f"Caution: these policies also differ in {', '.join(confounders)}.")
        parts.append(
            f'<h3>{html.escape(question)}</h3>\n<div class="answer {kind}"><p><strong>{html.escape(answer)}</strong></p>'
            + "".join(f"<p>{html.escape(line)}</p>" for line in lines)
            + "</div>"
        )
    parts.append(page.paragraph(video_verdict(video.evaluation["psnr"], video.evaluation["psnr_last_frame_repeated"])))
    compared = rows | ({} if ceiling is None else {_EXPERT: [ceiling["success"]]})
    tasks = list(rows[first][0])
    groups = [
        [
            [task if i == 0 else "", label, *_success_cells([table[task] for table in tables])]
            for i, (label, tables) in enumerate(compared.items())
        ]
        for task in tasks
    ]
    parts.append(
        page.table(
            ["task", "policy", "successes", "rate", "95 % interval", "rate of each run"],
            groups,
            2,
            "Closed-loop success in the simulator, from the same unseen starts for every policy. Training runs of a policy are "
            "pooled; intervals are Wilson's.",
        )
    )
    parts.append(_success_plot(compared, tasks, figures))
    steps = {label: [run.evaluation["open_loop"]["first_step_rmse"] for run in runs] for label, runs in arms.items()}
    windows = arms[first][0].evaluation["open_loop"]["windows"]
    parts.append(
        page.table(
            ["policy", "training runs", "error of the chunk", "error of its first action"],
            [[[label, str(len(arms[label])), _spread(errors[label]), _spread(steps[label])] for label in arms]],
            1,
            f"Root mean square error of planned actions on {windows} held-out windows, {_error_unit(arms)}. "
            "± is the standard deviation between training runs.",
        )
    )
    return page.section("Summary", *parts)


def _success_cells(rows: Sequence[Mapping]) -> list[str]:
    successes, episodes = _pool(rows)
    low, high = wilson_interval(successes, episodes)
    each = ", ".join(f"{100 * row['rate']:.1f}" for row in rows) + " %"
    return [f"{successes}/{episodes}", f"{100 * successes / episodes:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %", each]


def _success_plot(compared: Mapping[str, list[dict]], tasks: Sequence[str], figures: Path) -> str:
    figure = matplotlib_figure()(figsize=(8, 0.7 + 0.24 * len(tasks) * (len(compared) + 1)), layout="constrained")
    axes = figure.subplots()
    for i, (label, tables) in enumerate(compared.items()):
        pooled = [_pool(table[task] for table in tables) for task in tasks]
        lows, highs = zip(*(wilson_interval(*counts) for counts in pooled), strict=True)
        heights = [row + 0.55 * (i - (len(compared) - 1) / 2) / len(compared) for row in range(len(tasks))]
        colour = page.GREY if label == _EXPERT else page.colour(i)
        axes.hlines(heights, [100 * low for low in lows], [100 * high for high in highs], color=colour)
        axes.plot([100 * s / n for s, n in pooled], heights, "o", color=colour, label=label)
    axes.set(xlim=(-2, 102), xlabel="success rate, %", yticks=range(len(tasks)), yticklabels=tasks)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return _plot(
        figure,
        figures / "success.png",
        "Success rates of the table above, with their 95 % intervals. "
        "Where two intervals overlap widely, the number of episodes does not tell these policies apart.",
    )


def _training(arms: Mapping[str, list[_Run]], video: _Run, figures: Path) -> str:
    figure = matplotlib_figure()(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _loss_curve(left, video, page.GREY, "")
    for i, (label, runs) in enumerate(arms.items()):
        for run in runs:
            _loss_curve(right, run, page.colour(i), f"{label}, " if run is runs[0] else None)
    for axes, name in ((left, "video stage"), (right, "action stage")):
        axes.set(title=name, xlabel="training step", ylabel="flow-matching error", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize="small")
    averaged = ", with averaged weights" if all(run.config.train.ema_decay for run in [video, *_all_runs(arms)]) else ""
    caption = (
        f"Mean squared velocity error during training (thin) and on held-out windows (dots{averaged}), one line per "
        "run, on a logarithmic scale. A held-out error that rises while the training error falls is overfitting."
    )
    return page.section("Training", _plot(figure, figures / "training.png", caption))


def _loss_curve(axes: Any, run: _Run, colour: str, label: str | None) -> None:
    """Draws both curves of a run; `label` prefixes their legend entries, and None leaves them out of the legend."""
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "training": ("", {"lw": 0.9, "alpha": 0.6}),
        "held out": ("validation_", {"lw": 1.6, "marker": "o", "ms": 3.5}),
    }
    for what, (prefix, style) in styles.items():
        name = f"{prefix}{run.config.stage}_mse"
        points = [(record["step"], record[name]) for record in run.metrics if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=None if label is None else f"{label}{what}", **style)


def _video(video: _Run, figures: Path) -> str:
    model, copying = video.evaluation["psnr"], video.evaluation["psnr_last_frame_repeated"]
    strip = video.path / "videos" / "strip.png"
    if not strip.exists():
        raise RunError(f"{strip} does not exist: run launch/evaluate.py on {video.path} again")
    figure = matplotlib_figure()(figsize=(8, 3), layout="constrained")
    axes, frames = figure.subplots(), range(1, len(model) + 1)
    axes.plot(frames, model, color=page.COLOURS[0], marker="o", ms=4, label="predicted")
    axes.plot(frames, copying, color=page.GREY, marker="o", ms=4, ls="--", label="last frame repeated")
    axes.set(xlabel=f"future frame ({video.config.data.video_hz:g} per second)", ylabel="PSNR, dB")
    page.tidy(axes)
    shown = [(video.path / "videos" / f"{i:02d}.gif", text) for i, text in enumerate(video.evaluation["samples"])]
    cells = [_image(path, f"Real and predicted video: {text}", text) for path, text in shown if path.exists()]
    intro = f"{video_verdict(model, copying)} Checkpoint after {video.evaluation['checkpoint_step']} steps; held-out episodes."
    rows = (
        "Pairs of rows: real frames above, predicted ones below. The first column is the last observed frame; time runs to "
        "the right. See whether arm and object end up in the same place."
    )
    sides = (
        f"Left real, right predicted, at half speed. The first {video.config.data.past_frames} of "
        f"{video.config.data.num_frames} frames are observed."
    )
    curve = (
        f"Similarity to the real frames over {len(shown)} held-out samples; higher is better. Only above the dashed curve "
        "is a prediction worth more than standing still."
    )
    return page.section(
        "Predicted and real video",
        page.paragraph(intro),
        _image(strip, "Rows of real and predicted frames", rows, "strip"),
        page.grid(cells, 24, sides),
        _plot(figure, figures / "psnr.png", curve),
    )


def _open_loop(arms: Mapping[str, list[_Run]], figures: Path) -> str:
    figure = matplotlib_figure()(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for i, (label, runs) in enumerate(arms.items()):
        curves = [run.evaluation["open_loop"]["rmse_per_step"] for run in runs]
        columns, colour = list(zip(*curves, strict=True)), page.colour(i)
        steps = range(1, len(columns) + 1)
        axes.plot(steps, [statistics.mean(column) for column in columns], color=colour, marker="o", ms=4, label=label)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.18, lw=0)
    axes.set(xlabel="action of the chunk", ylabel="RMSE", ylim=(0, None))
    page.tidy(axes)
    caption = (
        f"Error of planned against recorded actions, {_error_unit(arms)}, by position in the chunk; lower is better. "
        "Lines are means, bands the range over training runs."
    )
    return page.section("Open-loop action error", _plot(figure, figures / "action_error.png", caption), _traces(arms, figures))


def _traces(arms: Mapping[str, list[_Run]], figures: Path) -> str:
    examples = {label: runs[0].evaluation["open_loop"]["example"] for label, runs in arms.items()}
    recorded = next(iter(examples.values()))["recorded"][:_TRACE_WINDOWS]
    dims = min(len(recorded[0]), _TRACE_DIMS)
    figure = matplotlib_figure()(figsize=(8, 0.7 + 1.15 * dims), layout="constrained")
    for dim, axes in enumerate(figure.subplots(dims, 1, sharex=True, squeeze=False)[:, 0]):
        axes.plot([action[dim] for action in recorded], color="black", lw=1.3, label="recorded")
        for i, (label, example) in enumerate(examples.items()):
            planned = [action[dim] for action in example["planned"][:_TRACE_WINDOWS]]
            axes.plot(planned, color=page.colour(i), lw=1.1, alpha=0.85, label=label)
        axes.set_ylabel(f"action {dim}")
        axes.grid(alpha=0.3)
    axes.set_xlabel("held-out window")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    caption = (
        f"First action planned in each of {len(recorded)} held-out windows, in raw units, by the first training run of "
        "each policy. A good policy follows the black line."
    )
    return _plot(figure, figures / "actions.png", caption)


def _rollouts(arms: Mapping[str, list[_Run]]) -> str:
    parts = []
    for task in [name for name in next(iter(arms.values()))[0].evaluation["success"] if name != "overall"]:
        for label, (run, *_) in arms.items():
            cells = []
            for episode in (e for e in run.evaluation["episodes"] if e["task"] == task):
                outcome = "success" if episode["success"] else "failure"
                path = run.path / "rollouts" / f"{task}_{episode['seed']}_{outcome}.gif"
                caption = f"seed {episode['seed']}: {outcome} after {episode['steps']} steps"
                cells += [_image(path, f"{task} with {label}, {caption}", caption)] if path.exists() else []
            if cells:
                parts.append(f"<h3>{html.escape(task)}, {html.escape(label)}</h3>" + page.grid(cells, 12))
    note = (
        "The first episodes of each task, not chosen by outcome, with the first training run of each policy. "
        "The same seed is the same start."
    )
    return page.section("Rollouts", page.paragraph(note if parts else "No rollouts were recorded."), *parts)


def _provenance(arms: Mapping[str, list[_Run]], video: _Run, expert: Path | None, path: Path) -> str:
    runs = [video, *_all_runs(arms)]
    rows = [
        [
            name,
            str(run.path),
            run.config.backbone_run or "random initialisation",
            str(run.config.seed),
            f"{run.metrics[-1]['step']} of {run.config.train.steps}",
        ]
        for name, group in arms.items()
        for run in group
    ]
    rows.append(
        [
            "",
            str(video.path),
            "trained here",
            str(video.config.seed),
            f"{video.metrics[-1]['step']} of {video.config.train.steps}",
        ]
    )
    commands = []
    for run in runs:
        backbone = [f"--config.backbone_run={run.config.backbone_run}"] if run.config.stage == "action" else []
        common = [f"--config=EXPERIMENT.py:{run.config.stage}", f"--workdir={run.path}"]
        commands.append(["python", "launch/train.py", *common, f"--config.seed={run.config.seed}", *backbone])
        changed = [
            f"--config.policy.{name}={value}"
            for name, value in run.evaluation.get("policy", {}).items()
            if to_dict(run.config.policy).get(name) != value
        ]
        commands.append(["python", "launch/evaluate.py", *common, *changed])
    if expert is not None:
        commands.append(["python", "launch/evaluate.py", "--config=EXPERIMENT.py:action", f"--workdir={expert}", "--expert"])
    labels = [f"--policy_run={label}={','.join(str(run.path) for run in group)}" for label, group in arms.items()]
    commands.append(
        [
            "python",
            "launch/report.py",
            f"--out={path}",
            f"--video_run={video.path}",
            *labels,
            *([] if expert is None else [f"--expert_run={expert}"]),
        ]
    )
    details = [
        f"<details><summary>{html.escape(str(run.path / 'config.json'))}</summary>"
        f"<pre>{html.escape(json.dumps(to_dict(run.config), indent=2))}</pre></details>"
        for run in runs
    ]
    packages = {"jax": "jax", "flax": "flax", "mimic_video": "mimic-video-jax"}
    versions = ", ".join(f"{name} {importlib.metadata.version(package)}" for name, package in packages.items())
    return page.section(
        "How it was made",
        page.table(["policy", "run", "backbone", "training seed", "steps done"], [rows], 3),
        page.paragraph("Commands. EXPERIMENT.py stands for an experiment file with the resolved configurations below."),
        f"<pre>{html.escape(chr(10).join(shlex.join(command) for command in commands))}</pre>",
        *details,
        page.paragraph(f"This page was written with {versions}."),
    )


# Pieces.


def _image(path: Path, alt: str, caption: str, css: str = "") -> str:
    return page.image(path.read_bytes(), path.suffix.removeprefix("."), alt, caption, css)


def _plot(figure: Any, path: Path, caption: str) -> str:
    path.write_bytes(page.png(figure))
    return _image(path, path.stem.replace("_", " "), caption, "plot")


def _count(pool: tuple[int, int]) -> str:
    return f"{pool[0]}/{pool[1]} ({100 * pool[0] / pool[1]:.1f} %)"


def _spread(values: Sequence[float]) -> str:
    """Mean, and ± the standard deviation where there are several values."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _error_unit(arms: Mapping[str, list[_Run]]) -> str:
    standard = all(run.config.data.normalization == "variance" for run in _all_runs(arms))
    return "in standard deviations of the training actions" if standard else "in units of normalised actions"
