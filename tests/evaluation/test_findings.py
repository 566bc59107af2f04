"""Every judge on arrays in which what it looks for is there, and on some in which it is not."""

import dataclasses

import numpy as np
import pytest

from mimic_video.config import PolicyConfig
from mimic_video.evaluation import findings
from mimic_video.evaluation.findings import ActionMeasurements, FlowTimeMeasurements, VideoMeasurements
from mimic_video.evaluation.recordings import Recording, response
from mimic_video.transforms import Normalizer, compute_statistics

EPISODES, EACH, STEPS, DIMS = 12, 4, 5, 2
SCALE = np.ones((STEPS, DIMS))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def measured(**changes):
    """Ramps from where a window begins, planned up to a little noise; every input matters, and none of the exchanges helps."""
    n = EPISODES * EACH
    times = 0.1 * np.arange(1, STEPS + 1)
    recorded = normal(n, 1, DIMS, seed=1) + times[:, None] * normal(n, 1, DIMS, seed=2) * 5
    planned = {"recorded": recorded + 0.05 * normal(n, STEPS, DIMS, seed=3)}
    planned["noise"] = planned["recorded"] + 0.02 * normal(n, STEPS, DIMS, seed=4)
    for seed, name in enumerate(("prompt", "video", "proprioception", "primary ↔ wrist")):
        planned[name] = planned["recorded"] + normal(n, 1, DIMS, seed=10 + seed)
    found = ActionMeasurements(
        episodes=np.repeat(np.arange(EPISODES), EACH),
        mask=np.ones((n, STEPS), bool),
        recorded=recorded,
        planned=planned,
        held=np.repeat(recorded[:, :1], STEPS, axis=1),
        times=times,
    )
    planned = {**planned, **changes.pop("planned", {})}
    return dataclasses.replace(found, planned=planned, **changes)


def levels(found):
    return {finding.check: finding.level for finding in (found if isinstance(found, list) else [found])}


def test_intervals_are_over_episodes_and_widen_with_comparisons():
    """Ten times as many windows of the same episodes say no more."""
    one, other = np.exp(normal(EPISODES)), np.full(EPISODES, 2.0)
    few = findings.ratio(one, other, np.arange(EPISODES))
    many = findings.ratio(*(np.repeat(values, 10) for values in (one, other, np.arange(EPISODES))))
    assert few == pytest.approx(many) and few.value == pytest.approx(np.exp(np.log(one).mean()) / 2)
    assert few.low < few.value < few.high
    wider = findings.ratio(one, other, np.arange(EPISODES), comparisons=10)
    assert wider.low < few.low and few.high < wider.high
    assert findings.ratio(one[:1], other[:1], np.arange(1)).high == np.inf


def test_intervals_hold_what_they_promise():
    """Of 2000 intervals at 99.9 %, more than 10 miss with a probability below 1e-5."""
    missed = 0
    for seed in range(2000):
        interval = findings.ratio(np.exp(normal(6, seed=seed)), np.ones(6), np.arange(6))
        missed += not interval.low <= 1 <= interval.high
    assert missed <= 10


def test_a_healthy_policy():
    found = measured()
    judged = [
        *findings.judge_baselines(found, SCALE),
        *findings.judge_inputs(found, SCALE, {}),
        findings.judge_cameras(found, SCALE),
        findings.judge_rate(found, SCALE),
        findings.judge_mirrored(found, ()),
    ]
    assert set(levels(judged).values()) == {"fine"}
    assert all(finding.advice == "" for finding in judged)


def test_baselines():
    lost = measured(planned={"recorded": normal(EPISODES * EACH, STEPS, DIMS, seed=5) * 3})
    assert levels(findings.judge_baselines(lost, SCALE)) == {"mean action": "fault", "held action": "fault"}
    found = measured()
    found.planned["recorded"][:, :, 1] += 4
    (mean, _) = findings.judge_baselines(found, SCALE)
    assert "higher in dimension 1," in mean.seen
    still = measured(recorded=np.where(np.arange(DIMS) == 1, 0.5, found.recorded))
    assert levels(findings.judge_baselines(still, SCALE))["mean action"] == "fine"  # nothing is better than a constant's mean
    few = measured(episodes=np.repeat([0, 1], EPISODES * EACH // 2), planned=lost.planned)
    assert levels(findings.judge_baselines(few, SCALE))["mean action"] == "doubt"


@pytest.mark.parametrize("name", ["prompt", "video", "proprioception"])
def test_an_input_that_is_ignored(name):
    found = measured()
    cut = measured(planned={name: found.planned["recorded"] + 0.001 * normal(EPISODES * EACH, STEPS, DIMS, seed=6)})
    judged = {finding.check: finding for finding in findings.judge_inputs(cut, SCALE, {})}
    assert {check for check, finding in judged.items() if finding.level == "fault"} == {name}
    assert ("by proprioception alone" in judged[name].seen) == (name == "video")
    assert levels(findings.judge_inputs(cut, SCALE, {}, predicts=False))[name] == "doubt"


def test_inputs_that_mislead_or_were_not_measured():
    found = measured()
    worse = measured(planned={"video": found.recorded, "recorded": found.planned["video"]})
    judged = {finding.check: finding for finding in findings.judge_inputs(worse, SCALE, {"prompt": "there is one"})}
    assert judged["video"].level == "fault" and "the video misleads the policy" in judged["video"].seen
    assert judged["prompt"].level == "doubt" and judged["prompt"].seen.endswith("not measured: there is one")


def test_cameras():
    found = measured()
    swapped = measured(planned={"recorded": found.planned["primary ↔ wrist"], "primary ↔ wrist": found.planned["recorded"]})
    finding = findings.judge_cameras(swapped, SCALE)
    assert finding.level == "fault" and "two cameras are swapped: with the cameras primary ↔ wrist" in finding.seen
    lost = {"recorded": found.recorded + 30, "primary ↔ wrist": found.recorded + 20}  # better, but not right
    assert findings.judge_cameras(measured(planned=lost), SCALE).level == "doubt"
    assert findings.judge_cameras(measured(planned={"primary ↔ wrist": found.planned["recorded"]}), SCALE).level == "doubt"


@pytest.mark.parametrize(("factor", "text"), [(0.5, "planned actions at 0.5 times"), (2.0, "planned actions at 2 times")])
def test_rate(factor, text):
    found = measured()
    start = found.recorded[:, :1] - (found.recorded[:, 1:2] - found.recorded[:, :1])
    finding = findings.judge_rate(measured(recorded=start + (found.recorded - start) * factor), SCALE)
    assert finding.level == "fault" and text in finding.seen and ("is slower" in finding.seen) == (factor < 1)
    lost = measured(planned={"recorded": found.recorded * 3 + 20})
    assert findings.judge_rate(lost, SCALE).level == "fine"


def test_mirrored_dimensions():
    found = measured()
    recorded = found.recorded * [1, -1] + [0, 7]
    finding = findings.judge_mirrored(measured(recorded=recorded), (1,))
    assert finding.level == "fault" and "gripper (or another switch) in action dimension 1, where" in finding.seen
    assert "in action dimension 0" not in finding.seen
    assert "; action dimension 1" in findings.judge_mirrored(measured(recorded=-found.recorded), ()).seen


def test_flow_time():
    times, episodes = np.array([0.9, 0.5, 0.1]), np.repeat(np.arange(EPISODES), EACH)
    error = np.exp(0.1 * normal(len(episodes)))
    curve = np.stack([3 * error, error, 2 * error])
    finding = findings.judge_flow_time(FlowTimeMeasurements(episodes, times, 0.9, curve, curve))
    assert finding.level == "doubt" and "'policy.stop_time' = 0.500" in finding.advice
    assert findings.judge_flow_time(FlowTimeMeasurements(episodes, times, 0.5, curve, curve)).level == "fine"


@pytest.mark.parametrize(
    ("strategy", "p95", "level"),
    [
        ("receding_horizon", 90, "fine"),
        ("receding_horizon", 300, "doubt"),  # the robot waits, more than one step
        ("receding_horizon", 600, "fault"),
        ("real_time_chunking", 300, "fine"),  # 5 of 10 actions are left
        ("real_time_chunking", 600, "fault"),
        ("temporal_ensembling", 110, "fault"),
    ],
)
def test_latency(strategy, p95, level):
    policy = PolicyConfig(strategy=strategy, execute_steps=5)
    finding = findings.judge_latency(p95 / 2, p95, policy, 10.0, 10, "cpu")
    assert finding.level == level and f"5 % of them more than {p95} ms, on cpu" in finding.seen


def videos(predicted, **changes):
    episodes, frames = np.arange(EPISODES), 4
    repeated = np.exp(0.1 * normal(EPISODES, frames)) * 1e-2
    found = VideoMeasurements(
        episodes=episodes,
        predicted={"recorded": repeated * predicted},
        repeated=repeated,
        tokenized=repeated * 0.1,
        scaled={2.0: (repeated[:, 0], repeated[:, 0] * predicted[0], repeated[:, 0])},
    )
    return dataclasses.replace(found, **changes)


def test_video():
    finding = findings.judge_video(videos(np.array([1.5, 0.9, 0.5, 0.25])), 5.0)
    assert (
        finding.level == "fine" and "0.8 s ahead predictions have 0.25" in finding.seen and "better from 0.4 s on" in finding.seen
    )
    worse = videos(np.array([1.5, 1.5, 1.5, 1.5]))
    finding = findings.judge_video(worse, 5.0)
    assert finding.level == "fault" and "stage `video` longer" in finding.advice
    finding = findings.judge_video(dataclasses.replace(worse, tokenized=worse.repeated * 1.2), 5.0)
    assert "the tokenizer loses more than moves" in finding.advice


def test_video_rate_prompt_and_cameras():
    found = videos(np.full(4, 0.5))
    own, repeated = found.predicted["recorded"], found.repeated[:, 0]
    assert findings.judge_video_rate(found).level == "fine"
    fast = dataclasses.replace(found, scaled={2.0: (repeated * 0.1, repeated * 0.5, repeated)})
    assert findings.judge_video_rate(fast).level == "fault"
    lost = dataclasses.replace(
        found, scaled={2.0: (repeated * 1.1, repeated * 5, repeated)}
    )  # better, but no better than nothing
    assert findings.judge_video_rate(lost).level == "fine"
    for factor, prompt, cameras in ((2.0, "fine", "fine"), (0.5, "doubt", "fault"), (1.0, "fault", "doubt")):
        changed = dataclasses.replace(found, predicted={"recorded": own, "prompt": own * factor, "primary ↔ wrist": own * factor})
        assert findings.judge_video_prompt(changed, "").level == prompt
        assert findings.judge_video_cameras(changed).level == cameras


def statistics(values):
    return compute_statistics(np.float32(values)[:, None])


def recorded(count, seed, offset=0.0, scale=1.0):
    """Episodes whose states follow their actions a step later."""
    found = []
    for number in range(count):
        actions = offset + scale * np.cumsum(normal(30, DIMS, seed=1000 * seed + number), axis=0)
        found.append(Recording(actions, np.concatenate([actions[:1], actions[:-1]]), actions))
    return found


def both(recordings):
    return {
        "action": statistics(np.concatenate([each.targets for each in recordings])),
        "proprio": statistics(np.concatenate([each.proprio for each in recordings])),
    }


def test_statistics():
    own, other = both(recorded(20, 1)), both(recorded(20, 1, scale=57))
    assert findings.judge_statistics(own, own).level == "fine"
    finding = findings.judge_statistics(other, own)
    assert finding.level == "fault" and "action dimension 0 has mean" in finding.seen and "proprio dimension 1" in finding.seen


@pytest.mark.parametrize(("offset", "level"), [(0.0, "fine"), (40.0, "fault")])
def test_new_data(offset, level):
    training = recorded(40, 1)
    deviations = {key: entry.std[0] for key, entry in both(training).items()}
    finding = findings.judge_new_data(training, recorded(12, 3, offset), deviations)
    assert finding.level == level and ("action dimension 0 by +" in finding.seen) == bool(offset)


def test_values_beyond_those_of_training():
    training = recorded(40, 1)
    stored = both(training)
    assert findings.judge_ranges(stored, recorded(12, 2), len(training)).level == "fine"
    finding = findings.judge_ranges(stored, recorded(12, 2, scale=10), len(training))
    assert finding.level == "fault" and "of action dimension 0 are above" in finding.seen
    assert findings.judge_ranges(stored, recorded(12, 2, scale=10), 0).level == "fine"  # of nothing, nothing is beyond


def test_constant_dimensions():
    training, new = recorded(5, 1), recorded(5, 2)
    assert findings.judge_constants(both(training), new).level == "fine"
    still = [dataclasses.replace(each, targets=np.where(np.arange(DIMS) == 1, 0.25, each.targets)) for each in new]
    finding = findings.judge_constants(both(training), still)
    assert finding.level == "fault" and finding.seen == "action dimension 1 is constant at 0.25, but not in training"
    assert findings.judge_constants(both(still), still).seen.endswith("0.25, and in training")
    assert findings.judge_constants(both(still), new).seen.endswith("in training alone")


@pytest.mark.parametrize(("clamp", "level"), [(False, "fine"), (True, "doubt")])
def test_round_trip(clamp, level):
    values = np.float32(normal(500, 1, DIMS)) * [1, 1000]
    normalizer = Normalizer.from_statistics(compute_statistics(values), "variance", percentile_clamp=clamp)
    assert findings.judge_round_trip(normalizer, values, np.ones((500, 1), bool)).level == level


def test_actions_and_states():
    own = recorded(24, 3)
    (finding,) = findings.judge_response(response(own), 10.0)
    assert finding.level == "fine" and "action 1 with proprioception 1 +0.1 s later (+1.00)" in finding.seen
    mirrored = [dataclasses.replace(each, proprio=-each.proprio[:, ::-1]) for each in own]
    (finding,) = findings.judge_response(response(mirrored), 10.0)
    assert finding.level == "fine" and "action 1 with proprioception 0 +0.1 s later (-1.00)" in finding.seen
    shuffled = [dataclasses.replace(each, actions=own[(number * 5 + 7) % 24].actions) for number, each in enumerate(own)]
    (finding,) = findings.judge_response(response(shuffled), 10.0)
    assert finding.level == "fault" and "do not fit the recorded states" in finding.seen
    early = [dataclasses.replace(each, proprio=np.roll(each.actions, -2, axis=0)) for each in own]
    _, order = findings.judge_response(response(early), 10.0)
    assert order.level == "fault" and "action 0 follows the state 2 steps later" in order.seen
