import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from pages import Page, require_self_contained
from PIL import Image

from mimic_video.config import experiment_from
from mimic_video.evaluation.offline import action_errors, psnr
from mimic_video.evaluation.report import difference_interval, error_verdict, success_verdict, video_verdict, write_report
from mimic_video.evaluation.rollouts import EpisodeResult, success_table
from mimic_video.runs.directory import write_config, write_json
from mimic_video.runs.storage import RunError

TASKS, SEEDS, LABEL = ("drawer-open-v3", "button-press-topdown-v3"), range(1000, 1008), 'trained <b>&"backbone"'


def _save_gif(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=50, loop=0)


def _train(run, stage, **config):
    write_config(run, experiment_from({"stage": stage, "train": {"steps": 60, "warmup_steps": 0}, **config}))
    lines = [{"step": step, "loss": 100.0 / step, f"{stage}_mse": 1.0 / step} for step in (20, 40, 60)]
    lines[-1][f"validation_{stage}_mse"] = 0.1
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_video_run(run):
    _train(run, "video")
    real = np.random.default_rng(0).integers(0, 256, (2, 6, 16, 16, 3)).astype(np.uint8)
    model, copying = (psnr(other, real, np.ones((2, 6), bool)).tolist() for other in (real // 2, real[:, ::-1]))
    evaluation = {"checkpoint_step": 60, "psnr": model, "psnr_last_frame_repeated": copying, "seconds": 1.0}
    write_json(run / "evaluation.json", evaluation | {"samples": ["open the drawer", "press <i>it</i>"]})
    for i in range(2):
        _save_gif(run / "videos" / f"{i:02d}.gif", np.concatenate([real[i], real[i]], axis=2))
    Image.fromarray(np.concatenate(list(real[0]), axis=1)).save(run / "videos" / "strip.png")
    return run


def _closed_loop(successes):
    """Evaluation of `successes` episodes per task."""
    results = [EpisodeResult(task, seed, i < successes, 7 + i) for task in TASKS for i, seed in enumerate(SEEDS)]
    episodes = [{"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps} for r in results]
    return {"success": success_table(results), "episodes": episodes, "policy": {"stop_step": 0}, "seconds": 1.0}


def make_policy_run(run, successes, error, **config):
    _train(run, "action", **config)
    actions = np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32)
    windows = [
        {
            "video": np.zeros((1, 2, 2, 2, 3), np.uint8),
            "proprio": np.zeros((1, 2)),
            "instruction": "go",
            "actions": chunk,
            "action_mask": np.ones(3, bool),
        }
        for chunk in actions
    ]
    plan = lambda images, proprio, instructions, query: np.concatenate([actions + error, actions[:2]])  # noqa: E731
    open_loop = action_errors(plan, windows, 1, SimpleNamespace(scale=1.0), batch_size=8)
    write_json(run / "evaluation.json", {"open_loop": open_loop, **_closed_loop(successes)})
    for outcome in ("success", "failure"):  # one of them is left from an earlier evaluation
        _save_gif(run / "rollouts" / f"{TASKS[0]}_1000_{outcome}.gif", np.zeros((3, 16, 16, 3), np.uint8))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    video, expert = make_video_run(root / "video"), root / "expert"
    expert.mkdir()
    write_json(expert / "evaluation.json", _closed_loop(8))
    trained = [make_policy_run(root / f"trained{i}", 7 - i, 0.1 + i / 10, seed=i, backbone_run=str(video)) for i in (0, 1)]
    untrained = [make_policy_run(root / f"untrained{i}", 1, 0.5, seed=i) for i in (0, 1)]
    policies = {LABEL: trained, "untrained backbone": untrained}
    return {"video_run": video, "policies": policies, "expert": expert}


@pytest.fixture(scope="module")
def source(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, title="A <title>", **runs)
    assert {p.name for p in (path.parent / "figures").iterdir()} == {
        "success.png",
        "training.png",
        "psnr.png",
        "action_error.png",
        "actions.png",
    }
    return path.read_text()


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_the_page_is_self_contained_and_well_formed(source):
    formats = require_self_contained(source)
    assert (formats.count("png"), formats.count("gif")) == (6, 4)  # five plots, one strip; two videos, two rollouts


def test_numbers_are_those_of_the_files(runs, page):
    for label, directories in runs["policies"].items():
        tables = [json.loads((run / "evaluation.json").read_text()) for run in directories]
        pooled = sum(table["success"]["overall"]["successes"] for table in tables)
        each = ", ".join(f"{100 * table['success']['overall']['rate']:.1f}" for table in tables) + " %"
        row = next(row for row in page.rows if row[1:3] == [label, f"{pooled}/32"])
        assert row[3] == f"{100 * pooled / 32:.1f} %" and row[5] == each
        errors = [table["open_loop"]["rmse"] for table in tables]
        assert [label, "2", f"{np.mean(errors):.3f} ± {np.std(errors, ddof=1):.3f}"] in [row[:3] for row in page.rows]
    overall = json.loads((runs["expert"] / "evaluation.json").read_text())["success"]["overall"]
    interval = f"{100 * overall['low']:.1f} to {100 * overall['high']:.1f} %"
    assert ["", "scripted expert", "16/16", "100.0 %", interval, "100.0 %"] in page.rows
    video = json.loads((runs["video_run"] / "evaluation.json").read_text())
    assert video_verdict(video["psnr"], video["psnr_last_frame_repeated"]) in page.text
    assert f"{np.mean(video['psnr']):.1f} dB against {np.mean(video['psnr_last_frame_repeated']):.1f} dB" in page.text


def test_text_from_files_and_labels_is_escaped(source, page):
    assert "<b>" not in source and "<i>" not in source and "A <title>" not in source
    assert LABEL in page.text and "press <i>it</i>" in page.text


def test_a_rollout_of_an_earlier_evaluation_is_not_shown(page):
    captions = [word for word in page.words if word.startswith("seed ")]
    assert captions == ["seed 1000: success after 7 steps"] * 2


def test_conclusion_on_the_page_follows_from_the_configurations(runs, page):
    assert "Does video pretraining help?" in page.text and "Caution" not in page.text
    assert f"Yes: success is higher in each run with {LABEL} than in any with untrained backbone." in page.text


def test_other_differences_between_the_policies_are_named(runs, tmp_path):
    longer = make_policy_run(tmp_path / "longer", 1, 0.5, noise={"scale": 2.0})
    values = json.loads((longer / "evaluation.json").read_text())
    write_json(longer / "evaluation.json", values | {"policy": {"stop_step": 4}})
    policies = {"untrained": runs["policies"]["untrained backbone"][:1], "longer": [longer]}
    write_report(tmp_path / "report.html", title="t", **{**runs, "policies": policies, "expert": None})
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Is success higher with untrained than with longer?" in text
    assert "Caution: these policies also differ in noise.scale, policy.stop_step." in text
    assert f"python launch/evaluate.py --config=EXPERIMENT.py:action --workdir={longer} --config.policy.stop_step=4\n" in text


@pytest.mark.parametrize("name", ["evaluation.json", "config.json", "metrics.jsonl"])
def test_a_missing_file_is_named(runs, tmp_path, name):
    run = make_policy_run(tmp_path / "run", 1, 0.5)
    (run / name).unlink()
    with pytest.raises(RunError, match=rf"run.*{re.escape(name)}"):
        write_report(tmp_path / "report.html", title="t", video_run=runs["video_run"], policies={"a": [run]}, expert=None)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_evaluation_is_named(runs, tmp_path):
    run = make_policy_run(tmp_path / "run", 1, 0.5)
    (run / "evaluation.json").write_text("\0" * 99)
    with pytest.raises(RunError, match=r"run.evaluation\.json is damaged: .*; run launch/evaluate\.py on that directory again"):
        write_report(tmp_path / "report.html", title="t", video_run=runs["video_run"], policies={"a": [run]}, expert=None)


def test_runs_that_cannot_be_compared_are_rejected(runs, tmp_path):
    def write(**changed):
        write_report(tmp_path / "report.html", title="t", **{**runs, **changed})

    with pytest.raises(RunError, match="expected stage 'video'"):
        write(video_run=runs["policies"][LABEL][0])
    with pytest.raises(RunError, match="at least one policy"):
        write(policies={})
    for change, message in [("episodes", "other tasks or seeds"), ("open_loop", "other recordings")]:
        other = make_policy_run(tmp_path / change, 1, 0.5)
        values = json.loads((other / "evaluation.json").read_text())
        values["episodes"] = values["episodes"][1:] if change == "episodes" else values["episodes"]
        values["open_loop"]["example"]["recorded"][0][0] += 1.0
        write_json(other / "evaluation.json", values)
        with pytest.raises(RunError, match=f"{change}.evaluation.json.*{message}"):
            write(policies={**runs["policies"], "other": [other]})


def _rows(*successes, episodes=40):
    return [{"successes": s, "episodes": episodes, "rate": s / episodes} for s in successes]


@pytest.mark.parametrize(
    ("a", "b", "kind", "answer"),
    [
        ([30], [10], "yes", "Yes, for these runs: success is higher with A, but training seeds were not repeated on both sides."),
        ([30, 32], [10, 12], "yes", "Yes: success is higher in each run with A than in any with B."),
        ([10, 12], [30, 32], "no", "No: success is lower in each run with A than in any with B."),
        ([39, 15], [10, 16], "open", "Not settled: success is higher with A over all episodes, but training runs overlap."),
        ([20], [18], "open", "Not settled: the 95 % interval of the difference in success includes zero."),
        ([0], [0], "open", "Not settled: the 95 % interval of the difference in success includes zero."),
    ],
)
def test_the_verdict_changes_with_the_data(a, b, kind, answer):
    assert success_verdict("A", _rows(*a), "B", _rows(*b))[:2] == (kind, answer)


def test_the_difference_interval_is_newcombes():
    assert np.allclose(difference_interval((56, 70), (48, 80)), (0.2, 0.0524, 0.3339), atol=1e-4)  # Newcombe 1998, example (a)
    difference, low, high = difference_interval((48, 80), (56, 70))
    assert np.allclose((difference, low, high), (-0.2, -0.3339, -0.0524), atol=1e-4)


def test_the_error_verdict_changes_with_the_data():
    assert error_verdict("A", [0.2, 0.3], "B", [0.4, 0.6]) == (
        "Held-out action error is 0.250 ± 0.071 with A and 0.500 ± 0.141 with B: 50.0 % lower with A, "
        "and lower in each run than in any with B."
    )
    assert error_verdict("A", [0.2, 0.5], "B", [0.4, 0.1]).endswith("40.0 % higher with A; training runs overlap.")
    assert error_verdict("A", [0.2], "B", [0.4]).endswith("50.0 % lower with A; training seeds were not repeated on both sides.")
