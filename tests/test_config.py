import dataclasses
import json
import math
import typing

import ml_collections
import pytest

from mimic_video.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OnResume,
    Shaped,
    TrainConfig,
    describe,
    experiment_from,
    field_paths,
    shaping,
    split_paths,
    stored_experiment,
    to_dict,
    unknown_field_message,
    value_at,
)
from mimic_video.trees import flat


def changed() -> ExperimentConfig:
    """No value of a type that JSON or ml_collections could lose is at its default."""
    return ExperimentConfig(
        stage="video",
        seed=3,
        precision="bfloat16",
        data=DataConfig(image_size=(32, 48), action_delay=0.0),
        train=TrainConfig(betas=(0.5, 0.75), average_generated_only=False, learning_rate=1.0),
        evaluation=dataclasses.replace(ExperimentConfig().evaluation, tasks=("a", "b")),
    )


@pytest.mark.parametrize("encode", [lambda d: d, lambda d: json.loads(json.dumps(d)), ml_collections.ConfigDict])
def test_round_trip(encode):
    for config in (ExperimentConfig(), changed()):
        assert experiment_from(encode(to_dict(config))) == config


def test_missing_fields_keep_their_defaults():
    config = experiment_from({"train": {"steps": 7, "warmup_steps": 2}})
    assert (config.train.steps, config.train.warmup_steps, config.train.betas) == (7, 2, (0.9, 0.99))
    assert config.data == DataConfig()


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"train": {"stepz": 5}}, "train.stepz", "train.steps"),
        ({"backbone": {"num_head": 5}}, "backbone.num_head", "backbone.num_heads"),
        ({"sede": 5}, "sede", "seed"),
        ({"trian": {"steps": 5}}, "trian", "train"),
        ({"decoder": {"actiondim": 5}}, "decoder.actiondim", "decoder.action_dim"),
    ],
)
def test_an_unknown_field_names_the_nearest_known_one(values, unknown, nearest):
    with pytest.raises(ConfigError, match=f"unknown config field '{unknown}'; did you mean '{nearest}'"):
        experiment_from(values)


def test_every_field_has_a_dotted_path():
    paths = field_paths(ExperimentConfig)
    assert {"seed", "data.image_size", "backbone.hidden_block", "train.betas", "mesh.fsdp"} <= set(paths)
    assert "train" not in paths and len(set(paths)) == len(paths)
    assert "'policy.stop_step'" in unknown_field_message("policy.stopstep", paths)


def test_every_field_says_what_it_is_what_may_change_and_what_presupposes_it():
    """A field without a class cannot be described."""
    values, fields = flat(to_dict(ExperimentConfig())), describe(ExperimentConfig)
    assert {field.path: field.default for field in fields} == values
    for field in fields:
        assert field.help and field.help == field.help.strip(), field.path
        assert field.on_resume in typing.get_args(OnResume), field.path
        assert set(field.shapes) <= set(typing.get_args(Shaped)), field.path
        assert not field.shapes or field.on_resume == "fixed", f"{field.path} shapes {field.shapes}"
    found = {field.path: field for field in fields}
    assert found["train.schedule"].type == "Literal['constant', 'cosine', 'linear', 'wsd']"
    assert (found["train.betas"].type, found["data.workers"].type) == ("tuple[float, float]", "int")


def test_what_may_change_when_a_run_goes_on():
    classes = {field.path: field.on_resume for field in describe(ExperimentConfig)}
    assert [path for path, on_resume in classes.items() if on_resume == "extends"] == ["train.steps"]
    free = ("backbone_run", "data.action_dataset", "data.root", "data.latents", "data.workers", "data.frame_cache_mb")
    free += ("data.skip_broken", "train.log_every", "train.checkpoint_every", "text.cache", "mesh.fsdp", "policy.noise_stream")
    assert {classes[path] for path in free} == {"free"}
    fixed = ("seed", "stage", "start_run", "data.train_split", "data.video_hz", "train.batch_size", "decoder.proprio_dropout")
    assert {classes[path] for path in fixed} == {"fixed"}


def test_what_networks_presuppose():
    assert shaping("tokenizer") == ["tokenizer.kind", "tokenizer.width"]
    assert {"data.cameras", "text.rows", "backbone.text_width"} < set(shaping("backbone"))
    assert {"data.action_horizon", "backbone.hidden_block"} < set(
        shaping("decoder")
    )  # where it reads; the backbone has all blocks
    assert not {"backbone.hidden_block", "data.image_size"} & set(shaping("tokenizer", "backbone"))
    assert set(shaping("backbone", "decoder")) == {*shaping("backbone"), *shaping("decoder")}


STORED = {
    "text": {"rows": 4, "width": 8},
    "backbone": {"text_width": 8, "views": 2, "latent_channels": 16},
    "decoder": {"obs_horizon": 1, "action_horizon": 6},
    "data": {"action_horizon": 6, "cameras": ["primary", "wrist"]},
}


def test_a_stored_configuration_may_have_fields_that_are_derived_now():
    config = stored_experiment(STORED)
    assert (config.text.rows, config.backbone.text_width, config.data.action_horizon, config.data.views) == (4, 8, 6, 2)
    assert stored_experiment(to_dict(config)) == config


def test_a_stored_configuration_of_before_the_other_normaliser_has_the_published_clamp():
    old = to_dict(ExperimentConfig())
    del old["compat"]["percentile_clamp"]
    assert (
        stored_experiment(old).compat.percentile_clamp
        and not stored_experiment(to_dict(ExperimentConfig())).compat.percentile_clamp
    )
    assert stored_experiment(STORED).compat.percentile_clamp
    assert not experiment_from(old).compat.percentile_clamp  # one that is written, not stored


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("text.width", "expected 8, as follows from backbone.text_width"),
        ("decoder.action_horizon", "expected 6, as follows from data.action_horizon"),
        ("decoder.obs_horizon", "expected 1, as follows from a window, which has one step of proprioception"),
        ("backbone.views", "expected 2, as follows from the number of data.cameras"),
        ("backbone.latent_channels", "expected 16, as follows from the tokenizer"),
    ],
)
def test_what_is_derived_was_not_something_else_and_is_not_set(path, complaint):
    group, _, name = path.partition(".")
    with pytest.raises(ConfigError, match=f"config field '{path}' is 3; {complaint}"):
        stored_experiment(STORED | {group: STORED[group] | {name: 3}})
    with pytest.raises(ConfigError, match=f"unknown config field '{path}'; leave it out: it follows from "):
        experiment_from({group: {name: STORED[group][name]}})


def test_a_stored_configuration_has_no_other_unknown_fields():
    with pytest.raises(ConfigError, match=r"unknown config field 'text\.widht'; did you mean"):
        stored_experiment(STORED | {"text": {"widht": 8}})


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("train.steps", 5.0, "5.0; expected type int"),
        ("train.steps", "5", "'5'; expected type int"),
        ("train.steps", True, "True; expected type int"),
        ("train.steps", None, "None; expected type int"),
        ("train.learning_rate", "1e-3", "'1e-3'; expected type float"),
        ("train.learning_rate", True, "True; expected type float"),
        ("train.learning_rate", math.nan, "nan; expected a finite number"),
        ("train.learning_rate", math.inf, "inf; expected a finite number"),
        ("train.average_generated_only", 1, "1; expected type bool"),
        ("train.betas", 0.9, "0.9; expected a tuple"),
        ("train.betas", (0.9,), "(0.9,); expected 2 values"),
        ("train.betas", (0.9, "0.99"), "'0.99'; expected type float"),
        ("data.image_size", (64.0, 64), "64.0; expected type int"),
        ("data.video_dataset", 3, "3; expected type str"),
        ("evaluation.tasks", "reach-v3", "'reach-v3'; expected a tuple"),
        ("evaluation.tasks", ("reach-v3", 3), "3; expected type str"),
        ("stage", "vdeo", "'vdeo'; expected one of 'video', 'action'"),
        ("train.schedule", "step", "'step'; expected one of 'constant', 'cosine', 'linear', 'wsd'"),
        ("train", 5, "5; expected a group of fields"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(path, value, complaint):
    values = value
    for part in reversed(path.split(".")):
        values = {part: values}
    with pytest.raises(ConfigError) as error:
        experiment_from(values)
    assert str(error.value) == f"config field '{path}' is {complaint}"


def test_ints_widen_to_floats_and_lists_to_tuples():
    config = experiment_from({"train": {"learning_rate": 1, "betas": [0, 0.5]}, "data": {"image_size": [32, 48]}})
    assert config.train.learning_rate == 1.0 and type(config.train.learning_rate) is float
    assert config.train.betas == (0.0, 0.5) and type(config.train.betas[0]) is float
    assert config.data.image_size == (32, 48)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"data": {"past_frames": 4}}, "data.past_frames"),
        ({"data": {"future_frames": 6}}, "data.future_frames"),
        ({"data": {"image_size": (64, 40)}}, "data.image_size"),
        ({"data": {"action_delay": -0.1}}, "data.action_delay"),
        ({"data": {"control_hz": 0}}, "DataConfig.control_hz"),
        ({"backbone": {"width": 100, "num_heads": 16}}, "backbone.width"),
        ({"backbone": {"width": 64, "num_heads": 16}}, "backbone.num_heads"),
        ({"backbone": {"patch": (2, 2, 2)}}, "backbone.patch"),
        ({"backbone": {"num_blocks": 4}}, "backbone.hidden_block"),
        ({"decoder": {"num_heads": 3}}, "decoder.width"),
        ({"decoder": {"proprio_dropout": 1.0}}, "decoder.proprio_dropout"),
        ({"noise": {"tail_range": (5.0, 2.0)}}, "noise.tail_range"),
        ({"noise": {"tail_probability": 1.5}}, "noise.tail_probability"),
        ({"train": {"steps": 1000}}, "train.warmup_steps"),
        ({"train": {"ema_decay": 1.0}}, "train.ema_decay"),
        ({"train": {"batch_size": 0}}, "TrainConfig.batch_size"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "mesh"),
        ({"mesh": {"fsdp": 0}}, "mesh"),
        ({"policy": {"stop_step": 36}}, "policy.stop_step"),
        ({"policy": {"stop_time": 1.1}}, "policy.stop_time"),
        ({"policy": {"stop_time": 0.9, "stop_step": 3}}, "policy.stop_time"),
        ({"text": {"kind": "t5"}}, "text.model"),
        ({"text": {"kind": "t6"}}, "text.kind"),
        ({"tokenizer": {"kind": "vq"}}, "tokenizer.kind"),
        ({"backbone": {"kind": "wan"}}, "backbone.kind"),
        ({"tokenizer": {"chunk_latents": 0}}, "TokenizerConfig.chunk_latents"),
        ({"data": {"raw_action_dims": (3, 10)}}, "data.raw_action_dims"),
        ({"train": {"ema_std": 0.3}}, "train.ema_std"),
        ({"train": {"ema_std": 0.1, "ema_decay": 0.9}}, "train.ema_std"),
        ({"train": {"schedule_steps": 500}}, "train.schedule_steps"),
        ({"policy": {"execute_steps": 16}}, "policy.execute_steps"),
    ],
)
def test_values_that_contradict_each_other_are_named(values, field):
    with pytest.raises(ConfigError, match=f"config field '{field}' is "):
        experiment_from(values)


def test_the_published_window():
    config = ExperimentConfig()
    assert (config.data.num_frames, config.past_latents, config.latent_shape) == (61, 2, (16, 60, 80, 16))
    assert MeshConfig() == MeshConfig(data=-1, fsdp=1, sequence=1)


def test_no_compatibility_by_default():
    assert not any(dataclasses.astuple(ExperimentConfig().compat))


def test_a_tilde_is_the_home_directory_in_every_field_that_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [field.path for field in describe(ExperimentConfig) if "folder" in field.help or "run directory" in field.help]
    assert {"data.root", "data.latents", "text.cache", "text.model", "backbone_run", "start_run"} < set(paths)
    for path in set(paths) - {"data.video_dataset"}:  # a mixture of paths, see data_pipelines/mixture.py
        group, _, name = path.rpartition(".")
        for value, expected in (("~/a b", "/home/me/a b"), ("gs://bucket/~", "gs://bucket/~"), ("", ""), ("./~", "./~")):
            fields = {"backbone_run": "run"} | ({group: {name: value}} if group else {name: value})
            assert value_at(experiment_from(fields), path) == expected
        with pytest.raises(ConfigError, match=rf"^config field '{path}' is '~of_nobody/x'; expected a home directory .*'\./~of"):
            experiment_from({group: {name: "~of_nobody/x"}} if group else {name: "~of_nobody/x"})


def test_lists_of_paths_are_divided_outside_of_quotes():
    assert split_paths('a,"b,c*2"*3,d') == ["a", '"b,c*2"*3', "d"]
    assert split_paths('"a;b",c;10:"d;e"', ";") == ['"a;b",c', '10:"d;e"']
