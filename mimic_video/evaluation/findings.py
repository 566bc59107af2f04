"""Measured arrays → what is wrong with a run or its data, in one sentence, and what to do about it, in another.

Nothing here reads a file or runs a model. Errors are compared within an episode, as ratios, and intervals are over episodes: the
windows of one are alike. Bootstraps are too narrow for the ten episodes that a validation split often has, so intervals are
Student's, of the logarithms of the ratios. Each check is right with a probability of `CONFIDENCE`, however many comparisons
it makes: some fifteen checks then alarm falsely for one healthy run in sixty.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from mimic_video.config import PolicyConfig
from mimic_video.evaluation.recordings import Recording, Response
from mimic_video.transforms import Normalizer, Statistics

CONFIDENCE = 0.999
SCALES = (1 / 3, 1 / 2, 2 / 3, 3 / 2, 2, 3)  # by which a rate is usually wrong: 10, 15, 20 and 30 Hz taken for each other
_ROUNDING = 1 / 255**2 / 12  # mean square of what 8 bits round
_TINY = 1e-12  # of squares in normalised units: what float32 rounds
_LARGEST = 700  # whose exponential is a float64
_CONSTANT = 1e-5  # as in transforms.py
_PERMUTATIONS, _EPISODES = 9999, 256  # of a permutation test, whose smallest p is then 1e-4; episodes of each side, at most
_ENOUGH = 8  # episodes, with which an effect has to be two standard deviations large to be seen at `CONFIDENCE`

Level = Literal["fault", "doubt", "fine"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        check: its name.
        level: "fault" for what is wrong, "doubt" for what could not be told or may be meant so, "fine" for the rest.
        seen: one sentence, with numbers.
        advice: one sentence; empty where nothing is to be done.
    """

    check: str
    level: Level
    seen: str
    advice: str = ""


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.2g} to {self.high:.2g})"


@dataclasses.dataclass(frozen=True)
class ActionMeasurements:
    """Chunks of n windows, in raw units.

    Attributes:
        episodes: of each window, any numbers.
        mask: False for actions beyond the episode.
        recorded: what was commanded.
        planned: by name: "recorded" for observations as they are, "noise" for other noise of the action flow, and for one input
            that is another window's "prompt", "video" and "proprioception"; "A ↔ B" for two cameras that are exchanged.
        held: the command before the window, kept.
        times: of the actions, seconds after the window's current frame.
    """

    episodes: Int[np.ndarray, " n"]
    mask: Bool[np.ndarray, "n a"]
    recorded: Float[np.ndarray, "n a m"]
    planned: Mapping[str, Float[np.ndarray, "n a m"]]
    held: Float[np.ndarray, "n a m"]
    times: Float[np.ndarray, " a"]


@dataclasses.dataclass(frozen=True)
class VideoMeasurements:
    """Mean squared errors of predicted frames, from 0 to 1, over the views of n windows; NaN beyond the episode.

    Attributes:
        episodes: of each window, any numbers.
        predicted: by name: "recorded" for observations as they are, "prompt" for another window's; "A ↔ B" for exchanged cameras.
        repeated: of the last observed frame.
        tokenized: of the true frames, after the way through latents and back.
        scaled: by time scale s, of frame s·k of the prediction as frame k, of its frame k, and of the last observed frame; all of
            the same k.
    """

    episodes: Int[np.ndarray, " n"]
    predicted: Mapping[str, Float[np.ndarray, "n f"]]
    repeated: Float[np.ndarray, "n f"]
    tokenized: Float[np.ndarray, "n f"]
    scaled: Mapping[float, tuple[Float[np.ndarray, " n"], ...]]


@dataclasses.dataclass(frozen=True)
class FlowTimeMeasurements:
    """Mean squared errors of actions in normalised units, of n windows, over the flow times τ_v at which the video is read.

    Attributes:
        used: the τ_v of the policy.
        generated: at what the video sampler has come to by then.
        true: at the true video, noised to τ_v.
    """

    episodes: Int[np.ndarray, " n"]
    times: Float[np.ndarray, " t"]
    used: float
    generated: Float[np.ndarray, "t n"]
    true: Float[np.ndarray, "t n"]


def ratio(
    one: Float[np.ndarray, " n"],
    other: Float[np.ndarray, " n"],
    episodes: Int[np.ndarray, " n"],
    comparisons: int = 1,
    rounding: float = _TINY,
) -> Interval:
    """The geometric mean over episodes of mean `one` / mean `other`, with its interval; windows with NaN do not count.

    Args:
        comparisons: that the check makes, all of which are to be right.
        rounding: what of both means nothing.
    """
    there = np.isfinite(one) & np.isfinite(other)
    names, places = np.unique(episodes[there], return_inverse=True)
    counts = np.bincount(places, minlength=len(names))
    means = [np.bincount(places, values[there], len(names)) / counts + rounding for values in (one, other)]
    return _of_logs(np.log(means[0] / means[1]), comparisons)


def _of_logs(logs: np.ndarray, comparisons: int) -> Interval:
    value, margin = _mean_and_margin(logs, comparisons)
    return Interval(*(math.inf if x > _LARGEST else math.exp(x) for x in (value, value - margin, value + margin)))


def _mean_and_margin(values: np.ndarray, comparisons: int) -> tuple[float, float]:
    """Of Student's interval; endless for fewer than two values."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values.mean()) if len(values) else 0.0), math.inf
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / comparisons / 2, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values)))


def errors(
    chunks: Float[np.ndarray, "n a m"], recorded: Float[np.ndarray, "n a m"], mask: Bool[np.ndarray, "n a"], scale: np.ndarray
) -> Float[np.ndarray, "n a m"]:
    """Squared errors in normalised units; NaN beyond the episode."""
    return np.where(mask[:, :, None], ((np.float64(chunks) - recorded) * np.float64(scale)) ** 2, np.nan)


def _mean(squares: np.ndarray) -> Float[np.ndarray, " n"]:
    """Of each window over what is there; NaN where nothing is."""
    flat = squares.reshape(len(squares), -1)
    there = np.isfinite(flat)
    counts = there.sum(1)
    return np.where(counts, np.where(there, flat, 0).sum(1) / np.maximum(counts, 1), np.nan)


# Of policies.


def judge_baselines(found: ActionMeasurements, scale: Float[np.ndarray, "a m"]) -> list[Finding]:
    """Against always the mean of what was recorded, and against keeping the last command."""
    squares, mean, held = (
        errors(chunks, found.recorded, found.mask, scale)
        for chunks in (found.planned["recorded"], mean_chunks(found), found.held)
    )
    there = found.recorded[found.mask]
    moving = np.ptp(there, axis=0) > _CONSTANT * np.maximum(np.abs(there).max(0), 1)  # nothing is better than a constant's mean
    return [
        _baseline(found, squares, mean, moving, "mean action", "fault"),
        _baseline(found, squares, held, moving, "held action", "doubt"),
    ]


def mean_chunks(found: ActionMeasurements) -> Float[np.ndarray, "n a m"]:
    """The mean of what was recorded at every step, for every window."""
    counts = np.maximum(found.mask.sum(0), 1)[:, None]
    mean = (found.recorded * found.mask[:, :, None]).sum(0) / counts
    return np.broadcast_to(mean, found.recorded.shape).astype(np.float64)


def _baseline(
    found: ActionMeasurements, squares: np.ndarray, other: np.ndarray, moving: np.ndarray, name: str, not_better: Level
) -> Finding:
    if not moving.any():
        return Finding(name, "doubt", "no action dimension changes in what was recorded, so that there is nothing to predict")
    dims, steps = np.flatnonzero(moving), squares.shape[1]
    worse = [
        f"dimension {dim}"
        for dim in dims
        if ratio(_mean(squares[:, :, dim]), _mean(other[:, :, dim]), found.episodes, len(dims)).low > 1
    ]
    squares, other = squares[:, :, dims], other[:, :, dims]
    whole = ratio(_mean(squares), _mean(other), found.episodes)
    better = [k for k in range(steps) if ratio(_mean(squares[:, k]), _mean(other[:, k]), found.episodes, steps).high < 1]
    times = f"from {found.times[better[0]]:.3g} s on" if better else "at no step"
    seen = (
        f"the squared error of planned actions is {whole} times that of the {name}, lower {times}"
        + (f", and higher in {', '.join(worse)}" if worse else "")
        + f", in {_episodes(found)}"
    )
    if whole.high < 1 and not worse:
        return Finding(name, "fine", seen)
    advice = {
        "mean action": "look at the other findings first; if there are none, the policy has not learned its task: train it "
        "longer, or on more episodes",
        "held action": "a robot that mostly holds still is predicted well by holding still: look at the plans of its fast parts, "
        "and whether 'data.action_delay' and 'data.control_hz' are those of the robot",
    }[name]
    if whole.high < 1:
        return Finding(name, "doubt", seen, advice)
    enough = len(np.unique(found.episodes)) >= _ENOUGH
    return Finding(name, "fault" if whole.low > 1 else not_better if enough else "doubt", seen, advice)


_INPUTS = {
    "prompt": "give every task several prompts that make a difference in the same scene, and see that 'text.kind' is not 'hash' "
    "where prompts are free text",
    "video": "collect scenes in which the same pose asks for different actions, and raise 'decoder.proprio_dropout', so that the "
    "policy has to look",
    "proprioception": "see that it is what the actions are relative to, in the same units, and lower 'decoder.proprio_dropout'",
}


def judge_inputs(
    found: ActionMeasurements, scale: Float[np.ndarray, "a m"], missing: Mapping[str, str], predicts: bool = True
) -> list[Finding]:
    """Whether prompt, video and proprioception move the plans more than the sampler's own noise does, and make them better.

    Args:
        missing: why an input could not be exchanged.
        predicts: whether plans are better than the mean action: those of a policy that is lost say nothing of its inputs.
    """
    base, findings, moving = found.planned["recorded"], {}, set[str]()
    noise = errors(found.planned["noise"], base, found.mask, scale)
    spread = np.nansum(np.nanvar(np.where(found.mask[:, :, None], base, np.nan) * scale, axis=0))
    for name, advice in _INPUTS.items():
        if name in missing:
            findings[name] = Finding(name, "doubt", f"what the {name} does was not measured: {missing[name]}")
            continue
        moved, dims = errors(found.planned[name], base, found.mask, scale), base.shape[-1]
        each = [ratio(_mean(moved[:, :, dim]), _mean(noise[:, :, dim]), found.episodes, dims) for dim in range(dims)]
        most, share = max(each), np.nansum(np.nanmean(moved, axis=0)) / 2 / max(spread, _TINY)
        now, then = (errors(found.planned[of], found.recorded, found.mask, scale) for of in ("recorded", name))
        helps = ratio(_mean(then), _mean(now), found.episodes)
        seen = (
            f"with the {name} of another window plans move by {share:.0%} of their variance, at most {most} times as much as "
            f"with other noise, and their squared error is {helps} times what it was"
        )
        if helps.low > 1 and most.high > 1:
            moving.add(name)
            findings[name] = Finding(name, "fine", seen)
        elif helps.high < 1:
            moving.add(name)
            level: Level = "fault" if predicts else "doubt"
            findings[name] = Finding(name, level, f"the {name} misleads the policy: {seen}", advice)
        elif most.value < 1:
            findings[name] = Finding(name, "fault" if predicts else "doubt", f"the policy ignores the {name}: {seen}", advice)
        else:
            moving.add(name)
            findings[name] = Finding(name, "doubt", f"the {name} moves plans, but does not make them better: {seen}", advice)
    video = findings["video"]
    if video.seen.startswith("the policy ignores") and "proprioception" in moving:
        alone = video.seen.replace("ignores the video", "acts by proprioception alone and ignores the video")
        findings["video"] = dataclasses.replace(video, seen=alone)
    return list(findings.values())


def judge_cameras(found: ActionMeasurements, scale: Float[np.ndarray, "a m"]) -> Finding:
    chunks = {**found.planned, "mean": mean_chunks(found)}
    squares = {name: _mean(errors(values, found.recorded, found.mask, scale)) for name, values in chunks.items()}
    return _exchanged(squares, squares.pop("mean"), found.episodes, "planned actions")


def judge_video_cameras(found: VideoMeasurements) -> Finding:
    squares = {name: _mean(values) for name, values in found.predicted.items()}
    return _exchanged(squares, None, found.episodes, "predicted video")


def _exchanged(squares: Mapping[str, np.ndarray], baseline: np.ndarray | None, episodes: np.ndarray, what: str) -> Finding:
    """`baseline`: what is right has to be better than; less wrong may be any change of what is lost."""
    pairs = [name for name in squares if "↔" in name]
    if not pairs:
        return Finding("cameras", "fine", "there is one camera, which cannot be taken for another")
    found = {name: ratio(squares[name], squares["recorded"], episodes, len(pairs)) for name in pairs}
    name, best = min(found.items(), key=lambda item: item[1].value)
    seen = f"with the cameras {name} exchanged the squared error of {what} is {best} times what it was"
    right = baseline is None or ratio(squares[name], baseline, episodes, len(pairs)).high < 1
    if best.high < 1 and right:
        advice = (
            "exchange the two where they are read: the keys of the dataset's entry, --camera of the import, or the robot's cables"
        )
        return Finding("cameras", "fault", f"two cameras are swapped: {seen}", advice)
    if best.low <= 1:
        advice = "look at pictures of both: inspect_data draws them"
        return Finding("cameras", "doubt", f"swapped cameras would not be noticed: {seen}", advice)
    return Finding("cameras", "fine", seen)


def judge_rate(found: ActionMeasurements, scale: Float[np.ndarray, "a m"]) -> Finding:
    """Whether what was recorded looks like the plans at another speed, of the scales in `SCALES`."""
    mean, tried = mean_chunks(found), {}
    for factor in SCALES:
        times = found.times * factor
        steps = np.flatnonzero((times >= found.times[0]) & (times <= found.times[-1]) & (found.times > 0))
        if len(steps):
            scaled = _at(found.planned["recorded"], found.times, times[steps])
            parts = found.recorded[:, steps], found.mask[:, steps], scale[steps]
            chunks = scaled, found.planned["recorded"][:, steps], mean[:, steps]
            tried[factor] = tuple(_mean(errors(each, *parts)) for each in chunks)
    return _rate("action rate", tried, found.episodes, "planned actions", _TINY)


def _rate(check: str, tried: Mapping[float, tuple[np.ndarray, ...]], episodes: np.ndarray, what: str, rounding: float) -> Finding:
    """Squared errors of what is predicted at another speed, as it is, and of a baseline, by that speed."""
    if not tried:
        return Finding(check, "doubt", "the window is too short to compare speeds")
    found = {}
    for factor, (own, as_is, baseline) in tried.items():
        better, right = (ratio(own, each, episodes, 2 * len(tried), rounding) for each in (as_is, baseline))
        found[factor] = better, better.high < 1 and right.high < 1
    factor, (best, fits) = min(found.items(), key=lambda item: (not item[1][1], item[1][0].value))
    seen = f"{what} at {factor:.2g} times their speed have {best} times the squared error"
    if fits:
        return Finding(
            check,
            "fault",
            f"the rate is wrong: what was recorded is {'slower' if factor < 1 else 'faster'} than the model expects, and fits "
            f"{' or '.join(f'{each:.2g}' for each, (_, fitting) in found.items() if fitting)} times its speed; {seen}",
            "compare 'data.control_hz' and 'data.video_hz' with the rate of the recordings: the steps of an episode over its "
            "seconds, by a clock",
        )
    return Finding(check, "fine", f"no other speed fits: {seen}")


def _at(chunks: np.ndarray, times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Chunks (n, a, m) at other times, on straight lines."""
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    weight = ((wanted - times[after - 1]) / (times[after] - times[after - 1]))[:, None]
    return (1 - weight) * chunks[:, after - 1] + weight * chunks[:, after]


def judge_mirrored(found: ActionMeasurements, two_valued: Sequence[int]) -> Finding:
    """Dimensions in which plans go one way and recordings the other.

    Args:
        two_valued: dimensions such as a gripper's command.
    """
    planned, recorded = (
        np.where(found.mask[:, :, None], chunks, np.nan) for chunks in (found.planned["recorded"], found.recorded)
    )
    mirrored, dims = [], recorded.shape[-1]
    _, places = np.unique(found.episodes, return_inverse=True)
    for dim in range(dims):
        parts = [values[:, :, dim] - np.nanmean(values[:, :, dim]) for values in (planned, recorded)]
        # Of every episode the correlation about the means of all: within ±1, whatever an episode's size.
        sums = [
            np.bincount(places, np.nansum(product, axis=1)) for product in (parts[0] * parts[1], parts[0] ** 2, parts[1] ** 2)
        ]
        each = sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], _TINY))
        value, margin = _mean_and_margin(each, dims)
        if value + margin < 0:
            kind = "gripper (or another switch) in action dimension" if dim in two_valued else "action dimension"
            mirrored.append(f"{kind} {dim}, where plans and recordings correlate with {value:.2f} (below {value + margin:.2f})")
    if mirrored:
        return Finding(
            "direction",
            "fault",
            f"what was recorded is inverted against what the policy learned: {'; '.join(mirrored)}",
            "convert the new recordings to the convention of training (x → lowest + highest − x for a gripper), or train again",
        )
    return Finding("direction", "fine", f"plans go where recordings go in every action dimension, in {_episodes(found)}")


def judge_flow_time(found: FlowTimeMeasurements) -> Finding:
    """Whether another τ_v than the policy's gives better actions; a choice rather than a fault."""
    own = int(np.abs(found.times - found.used).argmin())
    best = int(found.generated.mean(1).argmin())
    change = ratio(found.generated[best], found.generated[own], found.episodes, len(found.times) - 1)
    gap = ratio(found.generated[best], found.true[best], found.episodes)
    seen = (
        f"actions read at τ_v = {found.times[own]:.3f}, where the policy stops, are best at τ_v = {found.times[best]:.3f}, with "
        f"{change} times the squared error; there the true future would change it by a factor of {1 / gap.value:.3g}"
    )
    if best != own and change.high < 1:
        return Finding("flow time", "doubt", seen, f"try 'policy.stop_time' = {found.times[best]:.3f} where there is time for it")
    return Finding("flow time", "fine", seen)


def judge_latency(p50_ms: float, p95_ms: float, policy: PolicyConfig, control_hz: float, horizon: int, device: str) -> Finding:
    """Against the time in which a plan has to be there, as the strategy has it."""
    overlapping = policy.strategy in ("asynchronous", "real_time_chunking")
    steps = {"open_loop": horizon, "temporal_ensembling": 1}.get(policy.strategy, policy.execute_steps)
    steps = horizon - policy.execute_steps if overlapping else steps
    given = 1000 * steps / control_hz
    seen = (
        f"a plan takes {p50_ms:.3g} ms, and 5 % of them more than {p95_ms:.3g} ms, on {device}; by "
        f"'policy.strategy' = {policy.strategy!r} it may take {given:.4g} ms, {steps} of the {horizon} actions of a chunk"
    )
    advice = "plan on a faster device, with fewer 'policy.stop_step' or 'policy.action_steps', or execute more of a chunk"
    if p95_ms > given:
        return Finding("latency", "fault", f"the policy is too slow: {seen}", advice)
    if not overlapping and p95_ms > 1000 / control_hz:
        return Finding("latency", "doubt", f"the robot waits for its plans: {seen}", f"{advice}; or an overlapping strategy")
    return Finding("latency", "fine", seen)


# Of videos.


def judge_video(found: VideoMeasurements, video_hz: float) -> Finding:
    """Against repeating the last observed frame."""
    predicted, frames = found.predicted["recorded"], found.repeated.shape[1]
    each = [ratio(predicted[:, k], found.repeated[:, k], found.episodes, frames, _ROUNDING) for k in range(frames)]
    limits = [ratio(found.tokenized[:, k], found.repeated[:, k], found.episodes, frames, _ROUNDING) for k in range(frames)]
    better = [k for k in range(frames) if each[k].high < 1]
    best = min(range(frames), key=lambda k: each[k].value)
    seen = (
        f"{(best + 1) / video_hz:.3g} s ahead predictions have {each[best]} times the squared error of repeating the last frame, "
        + (f"and are better from {(better[0] + 1) / video_hz:.3g} s on" if better else "and are better nowhere")
        + f"; the tokenizer alone would leave {limits[best].value:.2g} times"
    )
    if better:
        return Finding("video prediction", "fine", seen)
    if min(limit.high for limit in limits) > 1:
        advice = "the tokenizer loses more than moves: take the Wan VAE, or larger images"
    else:
        advice = (
            "train stage `video` longer, or on more of such videos, and see that 'data.video_hz' lets something move in a window"
        )
    enough = len(np.unique(found.episodes)) >= _ENOUGH
    return Finding("video prediction", "fault" if enough else "doubt", f"the video model sees no future: {seen}", advice)


def judge_video_rate(found: VideoMeasurements) -> Finding:
    return _rate("video rate", found.scaled, found.episodes, "predicted frames", _ROUNDING)


def judge_video_prompt(found: VideoMeasurements, missing: str) -> Finding:
    if missing:
        return Finding("prompt", "doubt", f"what the prompt does was not measured: {missing}")
    squares = {name: _mean(found.predicted[name]) for name in ("recorded", "prompt")}
    change = ratio(squares["prompt"], squares["recorded"], found.episodes, rounding=_ROUNDING)
    seen = f"with the prompt of another window the squared error of predicted video is {change} times what it was"
    if change.low > 1:
        return Finding("prompt", "fine", seen)
    level: Level = "fault" if np.array_equal(squares["prompt"], squares["recorded"]) else "doubt"
    return Finding("prompt", level, f"the prompt does not make videos better: {seen}", _INPUTS["prompt"])


# Of data.


def judge_statistics(stored: Mapping[str, Statistics], found: Mapping[str, Statistics]) -> Finding:
    """The statistics that a run normalises by, and those of the data that it was trained on."""
    wrong = []
    for key, own in stored.items():
        theirs = found[key]
        if own.mean.shape != theirs.mean.shape:
            wrong.append(f"{key} is {own.mean.shape} there and {theirs.mean.shape} in the data")
            continue
        size = np.maximum(np.abs(theirs.mean) + theirs.std, _CONSTANT)
        differs = (np.abs(own.mean - theirs.mean) > 1e-3 * size) | (np.abs(own.std - theirs.std) > 1e-3 * size)
        for dim in np.flatnonzero(differs.any(0)):
            wrong.append(
                f"{key} dimension {dim} has mean {own.mean[0, dim]:.4g} and deviation {own.std[0, dim]:.4g} there, "
                f"{theirs.mean[0, dim]:.4g} and {theirs.std[0, dim]:.4g} in the data"
            )
    if wrong:
        advice = "put the run's own embodiments.json back, or train again if the data have changed since"
        return Finding("statistics", "fault", f"the run normalises by statistics of other data: {'; '.join(wrong)}", advice)
    return Finding("statistics", "fine", "the run normalises by the statistics of its training data")


def judge_new_data(
    training: Sequence[Recording], recordings: Sequence[Recording], deviations: Mapping[str, Float[np.ndarray, " d"]]
) -> Finding:
    """Whether episodes could be among those of training: a permutation test over episodes, of all dimensions at once.

    Args:
        deviations: of training, by "action" and "proprio". A difference counts as a fault from one of them on, where what is
            usual here is what was rare there.
    """
    sides = [_of_episodes(_chosen(each), deviations) for each in (training, recordings)]
    counts, means = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    random, many = np.random.default_rng(0), len(sides[0][0])

    def differences(first: np.ndarray) -> np.ndarray:
        """Of the means of those that are chosen (k, n) and of the others: (k, d)."""
        one, other = first * counts, (1 - first) * counts
        return other @ means / other.sum(1)[:, None] - one @ means / one.sum(1)[:, None]

    own = (np.arange(len(counts)) < many)[None].astype(float)
    seen = differences(own)[0]
    chance = np.abs(differences(np.stack([random.permutation(own[0]) for _ in range(_PERMUTATIONS)])))
    typical = np.maximum(chance.std(0), _TINY)
    highest = (chance / typical).max(1)
    names = [f"{key} dimension {dim}" for key, values in deviations.items() for dim in range(len(values))]
    p = [(1 + (highest >= abs(value) / size).sum()) / (1 + _PERMUTATIONS) for value, size in zip(seen, typical, strict=True)]
    moved = [
        (abs(value), f"{name} by {value:+.2g}")
        for name, value, chance_of in zip(names, seen, p, strict=True)
        if chance_of <= 1 - CONFIDENCE
    ]
    if not moved:
        return Finding(
            "new data", "fine", f"these episodes could be of the training data (p = {min(p):.3g}, {len(recordings)} episodes)"
        )
    text = ", ".join(text for _, text in sorted(moved, reverse=True))
    seen_text = f"means are elsewhere than in the training data, in its standard deviations: {text} (p ≤ {1 - CONFIDENCE:.3g})"
    advice = (
        "see that units, zero positions and calibration are those of training; if they are, the policy has not learned this place"
    )
    return Finding("new data", "fault" if max(moved)[0] > 1 else "doubt", seen_text, advice)


def _chosen(recordings: Sequence[Recording]) -> list[Recording]:
    places = np.unique(np.linspace(0, len(recordings) - 1, min(_EPISODES, len(recordings))).round().astype(int))
    return [recordings[place] for place in places]


def _of_episodes(recordings: Sequence[Recording], deviations: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of every episode, and its means in standard deviations; a dimension that is constant in training is in raw units."""
    sizes = np.concatenate([np.where(values < _CONSTANT, 1, values) for values in deviations.values()])
    both = [np.concatenate([each.targets.mean(0), each.proprio.mean(0)]) / sizes for each in recordings]
    return np.array([len(each.targets) for each in recordings], float), np.stack(both)


def judge_ranges(stored: Mapping[str, Statistics], recordings: Sequence[Recording], training: int) -> Finding:
    """Values beyond those of training, which the normaliser clips.

    That the k most extreme of N + M exchangeable episodes are all among the M new ones has the probability
    M/(N+M) · (M−1)/(N+M−1) ···.

    Args:
        training: N, the number of episodes that the statistics are of.
    """
    bounds = [(key, stored[key].min[0], stored[key].max[0]) for key in ("action", "proprio")]
    comparisons, wrong, most = 2 * sum(len(low) for _, low, _ in bounds), [], (0.0, "")
    for key, low, high in bounds:
        values = [each.targets if key == "action" else each.proprio for each in recordings]
        for dim in range(len(low)):
            margin = 1e-5 * max(float(high[dim] - low[dim]), _CONSTANT)
            for side, beyond in (
                ("below", [each[:, dim] < low[dim] - margin for each in values]),
                ("above", [each[:, dim] > high[dim] + margin for each in values]),
            ):
                share, k = float(np.concatenate(beyond).mean()), sum(bool(each.any()) for each in beyond)
                new, every = len(recordings), len(recordings) + training
                p = math.prod((new - i) / (every - i) for i in range(k))
                text = f"{share:.1%} of {key} dimension {dim} are {side} {low[dim] if side == 'below' else high[dim]:.4g}"
                most = max(most, (share, text))
                if p < (1 - CONFIDENCE) / comparisons:
                    wrong.append(f"{text}, in {k} of {new} episodes")
    if wrong:
        advice = "compare units and calibration with those of training: the policy never sees more than the ends of its range"
        return Finding("clipped values", "fault", f"values are clipped, more than chance explains: {'; '.join(wrong)}", advice)
    what = f"at most {most[1]}, as chance would have it" if most[0] else "no value is beyond those of training"
    return Finding("clipped values", "fine", what)


def judge_constants(stored: Mapping[str, Statistics], recordings: Sequence[Recording]) -> Finding:
    """Dimensions that never change: in the recordings, or in what the run was trained on."""
    wrong = []
    for key in ("action", "proprio"):
        values = np.concatenate([each.targets if key == "action" else each.proprio for each in recordings])
        learned = np.abs(stored[key].max - stored[key].min).max(0) < _CONSTANT
        here = np.ptp(values, axis=0) < _CONSTANT * np.maximum(np.abs(values).max(0), 1)
        for dim in np.flatnonzero(here | learned):
            where = (
                "and in training" if here[dim] and learned[dim] else "but not in training" if here[dim] else "in training alone"
            )
            wrong.append(f"{key} dimension {dim} is constant at {values[0, dim]:.4g}, {where}")
    if wrong:
        advice = "see whether that joint or sensor is recorded, and leave the dimension out if it is not to move"
        return Finding("constant dimensions", "fault", "; ".join(wrong), advice)
    return Finding("constant dimensions", "fine", "every dimension of actions and proprioception changes")


def judge_round_trip(normalizer: Normalizer, recorded: Float[np.ndarray, "n a m"], mask: Bool[np.ndarray, "n a"]) -> Finding:
    """Recorded actions, normalised and back: what the policy would do if it did exactly what was recorded."""
    again = normalizer.unnormalize(normalizer.normalize(recorded))
    moved = np.where(mask[:, :, None], np.abs(np.float64(again) - recorded), 0)
    # Four operations round, each by half a unit in the last place of numbers that are no larger than these.
    eps = 2.0**-8 if normalizer.shift.dtype.name == "bfloat16" else 2.0**-23
    size = np.abs(recorded) + 2 * np.abs(np.float64(normalizer.shift)) + 1 / np.float64(normalizer.scale) * _CONSTANT
    changed = moved > 4 * eps * size
    share, most = changed.any(1).mean(0), moved.max((0, 1))
    if not changed.any():
        return Finding("round trip", "fine", f"recorded actions survive normalisation and its inverse up to {most.max():.2g}")
    dim = int(share.argmax())
    seen = (
        f"normalising loses recorded actions: {share[dim]:.1%} of windows change in dimension {dim}, by up to {most[dim]:.4g} in "
        "raw units"
    )
    advice = "see 'clipped values'; 'compat.percentile_clamp' = False keeps the rare values of training"
    return Finding("round trip", "doubt", seen, advice)


def judge_response(found: Response, control_hz: float) -> list[Finding]:
    """Whether states answer commands at all, after them, and in one direction."""
    dims = found.matched.shape[1]
    means = np.array([_mean_and_margin(found.matched[:, dim], 1)[0] for dim in range(dims)])
    related = []
    for dim in range(dims):
        sign = -1 if means[dim] < 0 else 1
        value, margin = _mean_and_margin(sign * (found.matched[:, dim] - found.others[:, dim]), dims)
        related.append(value > margin)
    parts = [
        f"action {dim} with {'changes of ' if found.change[dim] else ''}proprioception {found.proprio_dim[dim]} "
        f"{found.lag[dim] / control_hz:+.3g} s later ({means[dim]:+.2f})"
        for dim in range(dims)
    ]
    episodes = len(found.matched)
    seen = f"correlations in {episodes} episodes are: {', '.join(parts)}"
    if not any(related):
        level: Level = "fault" if episodes >= _ENOUGH else "doubt"
        text = f"recorded actions do not fit the recorded states better than those of another episode do; {seen}"
        advice = "see that actions and observations are of the same step and episode: they may be shuffled, or of another robot"
        findings = [Finding("actions and states", level, text, advice)]
    else:
        findings = [Finding("actions and states", "fine", seen)]
    early = []
    for dim in np.flatnonzero(related).tolist():
        sign = -1 if means[dim] < 0 else 1
        value, margin = _mean_and_margin(sign * (found.matched[:, dim] - found.never_before[:, dim]), dims)
        if found.lag[dim] < 0 and value > margin:
            early.append(f"action {dim} follows the state {-found.lag[dim]} steps later")
    if early:
        text = f"states move before their commands: {'; '.join(early)}"
        findings.append(Finding("order", "fault", text, "shift actions back, or take commands in place of measured positions"))
    return findings


def _episodes(found: ActionMeasurements) -> str:
    return f"{len(found.episodes)} windows of {len(np.unique(found.episodes))} episodes"
