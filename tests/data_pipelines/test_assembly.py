"""What a stage reads: whose the datasets are, with which statistics; and training from a program of one's own."""

import dataclasses
import itertools
import json
import pathlib
import textwrap

import numpy as np
import pytest
import tiny
from synthetic import SIZE, ListSource, NarrowSource, step_episode

from data_pipelines import assembly
from data_pipelines.assembly import TrainingData, find_embodiments, require_alike
from data_pipelines.datasets import open_datasets
from data_pipelines.loader import WindowDataset
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.statistics import action_statistics
from data_pipelines.writers import write_rlds
from mimic_video.config import ConfigError, to_dict
from mimic_video.embodiments import from_table, to_table
from mimic_video.runs import directory

ARM = (("one", "arm"), ("two", "arm"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Three prepared datasets, "one,two,three", of different numbers of steps; their values tell them apart."""
    folder, paths = tmp_path_factory.mktemp("data"), []
    for number, (name, lengths) in enumerate({"one": (12, 20), "two": (40,), "three": (15,)}.items()):
        episodes = [step_episode(n, episode=10 * number + e) for e, n in enumerate(lengths)]
        splits = {"train": episodes, "val": [step_episode(14, episode=10 * number + 9)]}
        paths.append(str(write_rlds(folder, name, splits, control_hz=10.0, image_size=SIZE, description="Steps that count.")))
    return ",".join(paths)


def experiment(datasets, embodiments=0, **data):
    return tiny.experiment(data={"action_dataset": datasets} | data, decoder={"embodiments": embodiments})


def assert_equal_statistics(found, expected):
    for key, fields in expected.items():
        for field, values in vars(fields).items():
            np.testing.assert_array_equal(getattr(found[key], field), values, err_msg=f"{key} {field}")


def episodes_of(windows, *names):
    return [episode for name in names for episode in windows[name].episodes]


def rows_of(data, config, count):
    """(raw, normalised, embodiment) of the first `count` batches, all rows; proprioception's first number."""
    raw = TrainingData(dataclasses.replace(config, data=dataclasses.replace(config.data, normalization="identity"))).open()
    pairs = zip(itertools.islice(raw.batches(0), count), itertools.islice(data.batches(0), count), strict=True)
    seen = [(one.observation, two.observation) for one, two in pairs]
    columns = [(one.proprio[:, 0, 0], two.proprio[:, 0, 0], two.embodiment) for one, two in seen]
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def test_datasets_of_one_robot_share_its_token_and_its_statistics(datasets):
    config = experiment(datasets, 2, robots=ARM)
    data = TrainingData(config).open()
    robots, windows = data.robots(), data.training.windows
    assert [(e.name, e.index, e.datasets) for e in robots.values()] == [("arm", 0, ("one", "two")), ("three", 1, ("three",))]
    assert_equal_statistics(robots["arm"].statistics, action_statistics(episodes_of(windows, "one", "two"), config.data))
    assert_equal_statistics(robots["three"].statistics, action_statistics(windows["three"].episodes, config.data))
    raw, normalised, embodiment = rows_of(data, config, 8)
    np.testing.assert_array_equal(embodiment, raw >= 2000)  # episodes are numbered from 0, 10 and 20, steps from 100 times that
    mean, std = (getattr(robots["arm"].statistics["proprio"], name)[0, 0] for name in ("mean", "std"))
    own = raw < 2000
    assert own.sum() > 20 and {*(raw[own] >= 1000)} == {False, True}  # of both datasets
    np.testing.assert_allclose(normalised[own], (raw[own] - mean) / std, rtol=1e-4, atol=1e-5)


def test_a_dataset_is_a_robot_of_its_own_unless_told_otherwise(datasets):
    config = experiment(datasets, 3)
    data = TrainingData(config).open()
    robots = data.robots()
    assert [(e.name, e.index, e.datasets) for e in robots.values()] == [
        (n, i, (n,)) for i, n in enumerate(("one", "two", "three"))
    ]
    for name, robot in robots.items():
        assert_equal_statistics(robot.statistics, action_statistics(data.training.windows[name].episodes, config.data))
    raw, _, embodiment = rows_of(data, config, 8)
    np.testing.assert_array_equal(embodiment, raw // 1000)


def test_one_robot_may_be_normalised_as_each_dataset_has_it(datasets):
    config = experiment(datasets, 2, robots=ARM, statistics="dataset")
    data = TrainingData(config).open()
    robots = data.robots()
    expected = [("arm/one", 0, ("one",)), ("arm/two", 0, ("two",)), ("three", 1, ("three",))]
    assert [(e.name, e.index, e.datasets) for e in robots.values()] == expected
    for robot in robots.values():
        own = data.training.windows[robot.datasets[0]].episodes
        assert_equal_statistics(robot.statistics, action_statistics(own, config.data))
    restored = from_table(json.loads(json.dumps(to_table(robots))))
    assert [(e.name, e.index, e.datasets) for e in restored.values()] == expected
    _, _, embodiment = rows_of(data, config, 8)
    (batch,) = itertools.islice(data.batches(0, restored), 1)
    np.testing.assert_array_equal(batch.observation.embodiment, embodiment[: len(batch.actions)])


def test_statistics_are_of_the_slice_alone(datasets):
    """Over its episodes, whatever the others hold; validation on the rest is normalised by them."""
    config = experiment(datasets.split(",")[0], train_split="train[1:]", validation_split="train[:1]")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, validate_every=2, validation_batches=1))
    whole = experiment(datasets.split(",")[0])
    data, everything = TrainingData(config).open(), TrainingData(whole).open().training.windows["one"].episodes
    robots = data.robots()
    assert_equal_statistics(robots["one"].statistics, action_statistics(everything[1:], config.data))
    assert {int(value) // 100 for value in robots["one"].statistics["proprio"].percentiles.ravel()} == {1}
    normalised = np.concatenate([batch.observation.proprio[:, 0, 0] for batch in itertools.islice(data.batches(0), 4)])
    proprio = robots["one"].statistics["proprio"]
    (batch,) = data.validation(robots)
    raw = normalised * proprio.std[0, 0] + proprio.mean[0, 0]
    assert {round(float(value)) // 100 for value in raw} == {1}
    lowest = data.robots()["one"].normalizers(config)["proprio"].low
    assert (batch.observation.proprio == lowest).all()  # of episode 0, far below all that the normaliser has seen


def test_a_clamp_that_loses_commands_is_named_with_its_dataset(tmp_path, caplog):
    """A release at the end of each episode, which a window's repeated last step shows more often the later its step."""
    episodes = [step_episode(60, episode=e) for e in range(3)]
    for episode in episodes:
        episode.actions[:, 1] = np.arange(60) == 59
    data = write_rlds(tmp_path, "release", {"train": episodes}, control_hz=10.0, image_size=SIZE, description="")
    for clamp in (False, True):
        config = tiny.experiment(data={"action_dataset": str(data)}, compat={"percentile_clamp": clamp})
        data_of_run = TrainingData(config).open()
        caplog.clear()
        robots = data_of_run.robots()
        chunk = data_of_run.training.windows["release"][58]["actions"]  # of which only the first action is in the episode
        normalizer = robots["release"].normalizers(config)["action"]
        back = normalizer.unnormalize(normalizer.normalize(chunk))[:, 1]
        assert chunk[:, 1].tolist() == [1.0] * 4
        if clamp:
            assert abs(back[0]) < 0.02  # lost: 1.7 % of the first actions
            assert [record.message for record in caplog.records] == [
                "dataset 'release': the clamp changes 1.8% of action dimension 1, which is 0 to 1, and leaves "
                "-0.008475 to -0.008475; compat.percentile_clamp=False keeps them"
            ]
        else:
            np.testing.assert_allclose(back, 1.0, rtol=1e-5)
            assert not caplog.records


def test_the_statistics_that_a_run_began_with_normalise(datasets):
    config = experiment(datasets, 2, robots=ARM)
    data = TrainingData(config).open()
    robots = data.robots()
    proprio = robots["arm"].statistics["proprio"]
    proprio = dataclasses.replace(proprio, mean=proprio.mean + 1)
    changed = robots | {"arm": dataclasses.replace(robots["arm"], statistics=robots["arm"].statistics | {"proprio": proprio})}
    one, two = (next(data.batches(0, each)).observation for each in (robots, changed))
    differs = (one.proprio != two.proprio).any(axis=(1, 2))
    np.testing.assert_array_equal(differs, one.embodiment == 0)


def test_what_batches_are_drawn_from_does_not_depend_on_robots(datasets):
    states = [TrainingData(experiment(datasets, robots=robots)).open().state(3) for robots in ((), ARM)]
    assert states[0] == states[1] and list(states[0]["datasets"]) == ["one", "two", "three"]


def test_the_number_of_robots_has_to_be_the_decoders(datasets):
    with pytest.raises(ConfigError, match=r"'decoder\.embodiments' is 3; expected 2, the number of robots"):
        TrainingData(experiment(datasets, 3, robots=ARM)).open()


def test_a_dataset_that_is_not_there_has_no_robot(datasets):
    with pytest.raises(
        ConfigError, match=r"'data\.robots' has a dataset 'too'; those of 'data\.action_dataset' are one, two, three"
    ):
        TrainingData(experiment(datasets, robots=(("one", "arm"), ("too", "arm")))).open()
    video = tiny.experiment(stage="video", data={"video_dataset": datasets, "robots": (("too", "arm"),)})
    assert list(open_datasets(video, "train").windows) == ["one", "two", "three"]  # stage `video` has no robots


@pytest.mark.parametrize("robots", [(("one", "arm"), ("one", "leg")), (("one", ""),), (("one", "arm/left"),)])
def test_pairs_that_mean_nothing(robots):
    with pytest.raises(ConfigError, match=r"'data\.robots' is .*; expected pairs \(dataset, robot\), each dataset once"):
        tiny.experiment(data={"robots": robots})


class DeltaSource(ListSource):
    """Episodes whose actions are commanded steps."""

    def __init__(self, *lengths):
        super().__init__(dataclasses.replace(step_episode(n), action_layout="delta") for n in lengths)


@pytest.mark.parametrize(
    ("make", "raw_dims", "message"),
    [
        (NarrowSource, None, "action widths are 2 and 1"),
        (DeltaSource, None, "action layouts are 'vector' and 'delta'"),
        (None, {"action": (1,), "proprio": ()}, r"dimensions that are not normalised are \{.*\(\).*\} and \{'action': \(1,\)"),
    ],
)
def test_datasets_of_one_robot_have_to_be_alike(make_source, config, make, raw_dims, message):
    one = WindowDataset(make_source(12), config, actions=True, robot="arm")
    two = WindowDataset((make or make_source)(15), config, actions=True, raw_dims=raw_dims, robot="arm")
    require_alike({"one": one, "same": WindowDataset(make_source(15), config, actions=True, robot="arm")})
    with pytest.raises(
        ConfigError, match=rf"^datasets 'one' and 'two' are of one robot, 'arm', but their {message}.*'data\.robots'"
    ):
        require_alike({"one": one, "same": one, "two": two})


def test_unlike_datasets_are_refused_before_anything_is_computed(datasets, tmp_path):
    narrow = write_rlds(
        tmp_path, "narrow", {"train": NarrowSource(20)}, control_hz=10.0, image_size=SIZE, description="One dimension."
    )
    mixed = experiment(f"{datasets},{narrow}", 2, robots=(*ARM, ("three", "arm"), ("narrow", "arm")))
    with pytest.raises(ConfigError, match=r"datasets 'one' and 'narrow' are of one robot, 'arm', .* widths are 2 and 1"):
        TrainingData(mixed).open()
    assert len(TrainingData(experiment(f"{datasets},{narrow}", 2, robots=(*ARM, ("three", "arm")))).open().robots()) == 2


def test_a_robot_has_the_cameras_that_any_of_its_datasets_has(make_source, config):
    config = dataclasses.replace(config, cameras=("primary", "wrist"))
    windows = {name: WindowDataset(make_source(12), config, actions=True, robot="arm") for name in ("one", "two")}
    windows["two"].cameras = ("primary", "wrist")
    assert find_embodiments(windows, config)["arm"].cameras == ("primary", "wrist")
    assert find_embodiments(windows | {"two": windows["one"]}, config)["arm"].cameras == ("primary",)
    apart = find_embodiments(windows, dataclasses.replace(config, statistics="dataset"))
    assert [robot.cameras for robot in apart.values()] == [("primary",), ("primary", "wrist")]


def test_samples_are_spread_over_all_datasets(datasets):
    data = TrainingData(experiment(datasets)).open()
    windows = sum(map(len, data.training.windows.values()))
    values = [sample["proprio"][0, 0] for sample in data.samples(9)]
    assert len(values) == 9 and {int(value // 1000) for value in values} == {0, 1, 2}
    assert len(list(data.samples(1000))) == windows


def test_validation_is_read_where_it_is_asked_for(datasets):
    config = experiment(datasets)
    assert TrainingData(config).open().validation() == []
    train = dataclasses.replace(config.train, validate_every=2, validation_batches=3, validation_curves=True)
    data = TrainingData(dataclasses.replace(config, train=train)).open(rows=[1, 3])
    batches = data.validation(data.robots())
    assert [len(batch.actions) for batch in batches] == [2, 2, 2] and batches[0].action_scale is not None
    missing = dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, validation_split="held_out"))
    with pytest.raises(DatasetError, match="no split 'held_out'"):
        TrainingData(missing).open()


def test_latents_need_the_tokenizer_that_made_them(datasets):
    config = tiny.experiment(backbone_run="runs/video", data={"action_dataset": datasets, "latents": "runs/latents"})
    with pytest.raises(ConfigError, match=r"'data\.latents' is 'runs/latents'; expected '', or the tokenizer"):
        TrainingData(config).open()


@pytest.mark.training
def test_the_program_in_the_modules_text(one_device, tmp_path, monkeypatch):
    """As it stands, on two datasets of one robot."""
    write = {"control_hz": 10.0, "image_size": tiny.SIZE, "description": "Noise."}
    paths = [write_rlds(tmp_path, name, {"train": [tiny.episode(15, seed)]}, **write) for seed, name in enumerate(("one", "two"))]
    mixed = ",".join(map(str, paths))
    data = {"video_dataset": mixed, "action_dataset": mixed, "robots": ARM}
    config = tiny.experiment(data=data, decoder={"embodiments": 1}, train={"steps": 2})
    (tmp_path / "experiment.json").write_text(json.dumps(to_dict(config)))
    monkeypatch.chdir(tmp_path)
    program = textwrap.dedent(assembly.__doc__[assembly.__doc__.index("    import json") :])
    assert len([line for line in program.splitlines() if line]) == 9
    found: dict = {}
    exec(program, found)
    assert int(found["state"].step) == 2 and pathlib.Path("runs/video/checkpoints/2").is_dir()
    assert list(directory.load_embodiments(tmp_path / "runs" / "action")) == ["arm"]
    assert found["policy"].embodiment.datasets == ("one", "two")
    batch = found["batch"]
    assert len(batch.actions) == config.train.batch_size and not batch.observation.embodiment.any()
