"""Every sweep that the files of configs/ declare, for every experiment that they have."""

import ast
import importlib.util
import pathlib
import re

import pytest
import shipped
from sweeps.points import expand, jobs

from mimic_video.splits import parse_split

ROOT = pathlib.Path(__file__).parents[2]


def module(file):
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sweep_of(file, name):
    return getattr(module(file), f"sweep_{name}" if name else "sweep")


def declared(file):
    """`lr` of sweep_lr; "" is the default one."""
    return [name.removeprefix("sweep").removeprefix("_") for name in vars(module(file)) if re.match("sweep(_|$)", name)]


def expanded(experiment, *names):
    return expand([f"--config={ROOT / 'configs' / experiment.replace(':', '.py:')}"], names)


SWEEPS = [(experiment, sweep) for experiment in shipped.EXPERIMENTS for sweep in declared(experiment.partition(":")[0])]


def test_which_sweeps_there_are():
    common = {"", "lr", "weight_decay", "seed", "hidden_block", "demonstrations"}
    assert {*declared("quickstart")} == common | {"stop_step"}
    assert {*declared("small")} == common | {"lora_rank"}


@pytest.mark.parametrize(("experiment", "sweep"), SWEEPS)
def test_every_point_can_be_trained_and_is_there_once(experiment, sweep):
    file = experiment.partition(":")[0]
    points, repeated = expanded(experiment, sweep)
    made = list(sweep_of(file, sweep)())
    assert repeated == {} and [point.entry.values for point in points] == made and len(made) > 1
    assert len({point.entry.name for point in points}) == len({point.entry.out for point in points}) == len(made)


@pytest.mark.parametrize(("experiment", "sweep"), SWEEPS)
def test_a_sweep_says_which_stage_it_is_of(experiment, sweep):
    assert re.match(r"Of (either stage|stage `(video|action)`)[.:,]", sweep_of(experiment.partition(":")[0], sweep).__doc__)


@pytest.mark.parametrize("file", ["quickstart:action", "small:colab_action"])
def test_the_default_is_learning_rate_times_weight_decay(file):
    (default, _), (product, _) = expanded(file, ""), expanded(file, "lr", "weight_decay")
    assert [point.entry for point in default] == [point.entry for point in product]
    assert expand(default[0].training[:1], None)[0] == default


def test_names_of_points():
    names = {sweep: [point.entry.name for point in expanded("quickstart:action", sweep)[0]] for sweep in ("", "demonstrations")}
    assert names[""] == [f"learning_rate={r},weight_decay={d}" for r in (0.0003, 0.001, 0.003) for d in (0.0, 0.01, 0.1)]
    assert [re.sub("-[0-9a-f]{8}$", "", name) for name in names["demonstrations"]] == [
        f"train_split=train_0_{count}_+train_20_{20 + count}_" for count in (1, 2, 5, 10, 20)
    ]
    points, _ = expanded("quickstart:action", "stop_step", "seed")
    assert points[0].entry.name == "stop_step=0,seed=0" and points[-1].entry.name == "stop_step=35,seed=2"


def test_points_that_differ_in_evaluation_alone_share_a_run():
    points, _ = expanded("quickstart:action", "stop_step")
    (job,) = jobs(points, "runs/sweep", evaluate=True)
    assert job.run == "runs/sweep" and len(job.evaluations) == len(points) == 7
    seeds = jobs(expanded("quickstart:action", "seed", "stop_step")[0], "runs/sweep", evaluate=True)
    assert [(each.run, len(each.evaluations)) for each in seeds] == [(f"runs/sweep/seed={seed}", 7) for seed in (0, 1, 2)]


def test_hidden_blocks_go_from_none_to_the_last():
    for experiment, blocks in (("quickstart:action", 4), ("small:half_action", 28)):
        points, _ = expanded(experiment, "hidden_block")
        assert [point.config.backbone.hidden_block for point in (points[0], points[-1])] == [0, blocks]
        assert {point.config.backbone.num_blocks for point in points} == {blocks}


def test_demonstrations_are_as_many_of_each_task():
    """launch/collect.py writes one task after the other, as many episodes of each as launch/quickstart.py asks for."""
    (collected,) = re.findall(r"^EPISODES = (.*)$", (ROOT / "launch" / "quickstart.py").read_text(), re.M)
    each, tasks = module("quickstart").DEMONSTRATIONS, module("quickstart").TASKS
    assert ast.literal_eval(collected)["demonstrations"] == each
    chosen = [parse_split(point.config.data.train_split) for point in expanded("quickstart:action", "demonstrations")[0]]
    for split, count in zip(chosen, (1, 2, 5, 10, 20), strict=True):
        assert [number // each for number in split.numbers(each * len(tasks))] == [0] * count + [1] * count


def test_the_document_has_every_sweep_with_its_stage():
    text = (ROOT / "docs" / "sweeps.md").read_text("utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    found, file = {}, ""
    for experiment, sweep, stage, _ in rows[next(number for number, row in enumerate(rows) if row[0] == "experiment") + 1 :]:
        file = experiment or file
        found[file, "" if sweep.startswith("none") else sweep] = "either stage" if stage == "both" else f"stage `{stage}`"
    expected = {(file, name): sweep_of(file, name).__doc__ for file in ("quickstart", "small") for name in declared(file)}
    assert found.keys() == expected.keys()
    assert [key for key, words in expected.items() if not words.startswith(f"Of {found[key]}")] == []
