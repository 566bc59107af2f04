"""One HTML page of what was found about a run, and of what that was measured by."""

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mimic_video.config import ExperimentConfig, to_dict
from mimic_video.evaluation import page
from mimic_video.evaluation.findings import (
    ActionMeasurements,
    Finding,
    FlowTimeMeasurements,
    VideoMeasurements,
    errors,
    mean_chunks,
)
from mimic_video.media import matplotlib_figure

_ORDER = {"fault": 0, "doubt": 1, "fine": 2}
_TITLES = {"fault": "What is wrong", "doubt": "What may be wrong, or could not be told", "fine": "What is as it should be"}


@dataclasses.dataclass(frozen=True)
class Examination:
    """What was looked at, and what came of it.

    Attributes:
        run: where it is.
        data: which recordings were looked at.
        scale: of the normaliser of actions; there with `actions`.
    """

    run: str
    config: ExperimentConfig
    data: str
    findings: list[Finding] = dataclasses.field(default_factory=list)
    actions: ActionMeasurements | None = None
    scale: Float[np.ndarray, "a m"] | None = None
    flow_times: FlowTimeMeasurements | None = None
    video: VideoMeasurements | None = None

    @property
    def by_weight(self) -> list[Finding]:
        """Faults first; of the same weight in the order of the checks."""
        return sorted(self.findings, key=lambda finding: _ORDER[finding.level])

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "fault"]


def write_page(path: Path, examination: Examination) -> None:
    """Writes the page to `path`. Raises ModuleNotFoundError without matplotlib."""
    matplotlib_figure()
    title = f"Doctor: {examination.run}"
    parts = [f"<h1>{html.escape(title)}</h1>", page.paragraph(_summary(examination)), *map(_findings, _TITLES, [examination] * 3)]
    if examination.actions is not None and examination.scale is not None:
        parts.append(_actions(examination.actions, examination.scale))
    if examination.flow_times is not None:
        parts.append(_flow_times(examination.flow_times))
    if examination.video is not None:
        parts.append(_video(examination.video, examination.config.data.video_hz))
    parts.append(page.section("The run", f"<pre>{html.escape(json.dumps(to_dict(examination.config), indent=2))}</pre>"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.document(title, "\n".join(parts)), encoding="utf-8")


def _summary(examination: Examination) -> str:
    faults, checks = len(examination.faults), len(examination.findings)
    what = f"{faults} of {checks} checks found something wrong" if faults else f"none of {checks} checks found anything wrong"
    end = " What stands further down often follows from what stands above it." if faults > 1 else ""
    return f"Stage {examination.config.stage}, looked at with {examination.data}: {what}.{end}"


def _findings(level: str, examination: Examination) -> str:
    boxes = []
    for finding in examination.findings:
        if finding.level == level:
            css = {"fault": "answer no", "doubt": "answer", "fine": "answer yes"}[level]
            advice = f"<p>→ {html.escape(_sentence(finding.advice))}</p>" if finding.advice else ""
            seen = f"<p><b>{html.escape(finding.check)}</b> {html.escape(_sentence(finding.seen))}</p>"
            boxes.append(f'<div class="{css}">{seen}{advice}</div>')
    return page.section(_TITLES[level], *boxes) if boxes else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _actions(found: ActionMeasurements, scale: np.ndarray) -> str:
    """Root mean squares in normalised units, by step and by dimension."""
    chunks = {"policy": found.planned["recorded"], "mean action": mean_chunks(found), "held action": found.held}
    changed = {f"other {name}": values for name, values in found.planned.items() if name not in ("recorded", "noise")}
    squares = {name: errors(values, found.recorded, found.mask, scale) for name, values in {**chunks, **changed}.items()}
    figure = matplotlib_figure()(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(chunks):
        axes.plot(
            found.times, np.sqrt(np.nanmean(squares[name], axis=(0, 2))), marker="o", ms=3, label=name, color=page.colour(i)
        )
    axes.set(xlabel="seconds after the current frame", ylabel="error, normalised", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    dims = range(found.recorded.shape[-1])
    rows = [[name, *(f"{np.sqrt(np.nanmean(values[:, :, dim])):.3f}" for dim in dims)] for name, values in squares.items()]
    caption = "Root mean squared error by action dimension, in normalised units; below, with an input of another window."
    return page.section(
        "Planned actions against recorded ones",
        page.plot(figure, "action error over the chunk", "Open-loop error along the chunk."),
        page.table(["plan", *map(str, dims)], [rows[: len(chunks)], rows[len(chunks) :]], 1, caption),
    )


def _flow_times(found: FlowTimeMeasurements) -> str:
    figure = matplotlib_figure()(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate((("predicted video", found.generated), ("true video", found.true))):
        axes.plot(found.times, np.sqrt(values.mean(1)), marker="o", ms=4, label=name, color=page.colour(i))
    axes.axvline(found.used, color=page.GREY, ls=":", label="the policy")
    axes.set(xlabel="video flow time τ_v at which actions are read", ylabel="error, normalised", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return page.section(
        "How long the video is denoised", page.plot(figure, "action error over flow time", "1 is noise, 0 is video.")
    )


def _video(found: VideoMeasurements, video_hz: float) -> str:
    figure = matplotlib_figure()(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, Any] = {
        "predicted": found.predicted["recorded"],
        "last frame repeated": found.repeated,
        "tokenizer alone": found.tokenized,
    }
    seconds = np.arange(1, found.repeated.shape[1] + 1) / video_hz
    for i, (name, values) in enumerate(lines.items()):
        there = np.isfinite(values).any(0)
        psnr = -10 * np.log10(np.maximum(np.nanmean(values[:, there], axis=0), 1e-10))
        axes.plot(seconds[there], psnr, marker="o", ms=3, label=name, color=page.colour(i))
    axes.set(xlabel="seconds after the current frame", ylabel="PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return page.section("Predicted video", page.plot(figure, "video error over the horizon", "Higher is better."))
