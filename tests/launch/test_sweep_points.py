"""Points of sweeps: from declarations in an experiment's file to runs with names."""

import re
import textwrap

import experiment
import pytest
import tiny
from sweeps import points

from mimic_video.config import ConfigError

DECLARATIONS = """
def sweep_lr():
    for rate in (1e-4, 1e-3):
        yield {"train.learning_rate": rate}


def sweep_seed():
    for seed in (0, 1):
        yield {"seed": seed}


def sweep_stop_step():
    for step in (0, 2):
        yield {"policy.stop_step": step}


def sweep():
    for rate in sweep_lr():
        for seed in sweep_seed():
            yield rate | seed
    yield {"train.learning_rate": 1e-3, "seed": 0}


def sweep_wide():
    yield {"data.cameras": ("primary", "wrist"), "train.mask_padding": False, "train.schedule": "cosine", "data.root": "a b/c's"}


def sweep_names():
    yield {"data.latents": "x" * 200, "backbone_run": "y"}


def sweep_empty():
    return iter(())


def sweep_list():
    yield ["train.steps", 3]


def sweep_misspelt():
    yield {"train.lerning_rate": 1e-3}


def sweep_fraction():
    yield {"train.steps": 2.5}


def sweep_negative():
    yield {"train.steps": -1}


def sweep_text():
    yield {"policy.stop_time": "late"}
"""


@pytest.fixture
def arguments(config_file):
    """Those of an experiment with the declarations above."""
    file = config_file(tiny.experiment())
    file.write_text(file.read_text() + textwrap.dedent(DECLARATIONS))
    return [f"--config={file}", "--config.train.log_every=3"]


def expanded(arguments, *names):
    chosen, repeated = points.expand(arguments, names or None)
    return [point.entry.name for point in chosen], repeated, chosen


def test_every_point_is_there_once_with_what_the_command_line_sets(arguments):
    names, repeated, chosen = expanded(arguments)
    assert names == [f"learning_rate={rate},seed={seed}" for rate in (0.0001, 0.001) for seed in (0, 1)]
    assert repeated == {"learning_rate=0.001,seed=0": "learning_rate=0.001,seed=0"}
    assert [(point.config.train.learning_rate, point.config.seed) for point in chosen] == [
        (rate, seed) for rate in (1e-4, 1e-3) for seed in (0, 1)
    ]
    assert {point.config.train.log_every for point in chosen} == {3}
    assert expanded(arguments, "lr", "seed")[0] == names
    assert expanded(arguments, "seed", "lr")[0][1] == "seed=0,learning_rate=0.001"


def test_without_a_sweep_there_is_one_run_in_the_folder_itself(arguments):
    chosen, _ = points.expand(arguments, [])
    assert [point.config for point in chosen] == [points.expand(arguments, ["stop_step"])[0][0].config]
    (job,) = points.jobs(chosen, "gs://bucket/pretrain/", evaluate=False)
    assert job.run == "gs://bucket/pretrain" and job.training == (*arguments, "--workdir=gs://bucket/pretrain")
    assert job.commands == [("train.py", *job.training)]


def test_values_of_every_type_survive_the_command_line(arguments):
    (name,), _, (point,) = expanded(arguments, "wide")
    assert point.config.data.cameras == ("primary", "wrist") and not point.config.train.mask_padding
    assert point.config.data.root == "a b/c's"
    assert re.fullmatch(r"cameras=primary\+wrist,mask_padding=False,schedule=cosine,root=a_b_c_s-[0-9a-f]{8}", name)


def test_points_that_only_evaluation_tells_apart_share_a_run(arguments):
    _, _, chosen = expanded(arguments, "lr", "stop_step")
    assert [(point.entry.run, point.entry.out) for point in chosen] == [
        (f"learning_rate={rate}", f"learning_rate={rate}/evaluations/learning_rate={rate},stop_step={step}")
        for rate in (0.0001, 0.001)
        for step in (0, 2)
    ]
    jobs = points.jobs(chosen, "runs/sweep", evaluate=True)
    assert [job.run for job in jobs] == ["runs/sweep/learning_rate=0.0001", "runs/sweep/learning_rate=0.001"]
    train, first, second = jobs[0].commands
    assert train == ("train.py", *arguments, "--config.train.learning_rate=0.0001", f"--workdir={jobs[0].run}")
    assert first[0] == second[0] == "evaluate.py" and "--config.policy.stop_step=2" in second
    assert second[-2:] == (f"--workdir={jobs[0].run}", f"--out=runs/sweep/{chosen[1].entry.out}")
    with pytest.raises(ConfigError, match="stop_step=0 of the sweep sets what only evaluation reads; expected --then=evaluate"):
        points.jobs(chosen, "runs/sweep", evaluate=False)
    alone, _ = points.expand(arguments, ["stop_step"])
    assert [(point.entry.run, point.entry.out) for point in alone] == [("", f"evaluations/stop_step={step}") for step in (0, 2)]


def test_long_names_and_names_of_machines_are_short_and_differ(arguments):
    (name,), _, chosen = expanded(arguments, "names")
    assert len(name) <= 100 and re.search(r"x-[0-9a-f]{8}$", name)
    (job,) = points.jobs(chosen, "gs://bucket/7 My_Sweep of Something Rather Long/", evaluate=False)
    assert re.fullmatch(r"my-sweep-of-something-rath-[0-9a-f]{8}", job.name) and len(job.name) == 35
    assert points.cloud_name("gs://a/1", "gs://a/123") != points.cloud_name("gs://a/2", "gs://a/123")
    assert points.cloud_name("x", "gs://a/123").startswith("sweep-")


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["misspelt"], "sweep misspelt: unknown config field 'train.lerning_rate'; did you mean 'train.learning_rate'?"),
        (["fraction"], "point steps=2.5 of the sweep: .*train.steps=2.5: invalid literal for int"),
        (["negative"], "point steps=-1 of the sweep: config field 'TrainConfig.steps' is -1; expected a positive number"),
        (["text"], "point stop_time=late of the sweep: .*could not convert string to float: 'late'"),
        (["lr", "lr"], "two of the sweeps lr, lr set train.learning_rate; name one of them"),
        (["sed"], r"--sweep names 'sed', but there is no sweep_sed\(\) in .*; did you mean 'seed'\?"),
        (["empty"], "the sweep empty of .* has no points"),
        (["list"], r"sweep list yields \['train.steps', 3\]; expected {'FIELD': value, ...}"),
    ],
)
def test_mistakes_are_named(arguments, sweeps, message):
    with pytest.raises(ConfigError, match=message):
        points.expand(arguments, sweeps)


def test_arguments_of_an_experiment_are_told_from_others():
    given = ["--config=a.py", "--config.seed", "3", "--workdir=x", "--noconfig.train.mask_padding", "--config.data.skip_broken"]
    assert experiment.config_arguments([*given, "--configuration=4"]) == [
        "--config=a.py",
        "--config.seed=3",
        "--noconfig.train.mask_padding",
        "--config.data.skip_broken",
    ]
