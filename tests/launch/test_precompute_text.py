"""launch/precompute_text.py as a user runs it, and what its mistakes say."""

import re
import sys

import numpy as np
import pytest
import tiny
import tiny_t5

from data_pipelines.writers import write_rlds
from mimic_video.config import TextConfig
from mimic_video.models.text import make_text_encoder

pytestmark = pytest.mark.reference

ROWS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a T5."""
    folder = tmp_path_factory.mktemp("t5") / "model"
    tiny_t5.save(folder)
    return folder


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory, model, config_file):
    """An experiment with a dataset of "do task 0" and "do task 1" in the split train and "do task 0" in val."""
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)], "val": [tiny.episode(15, 2)]}
    folder = tmp_path_factory.mktemp("data")
    data = write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")
    text = {"kind": "t5", "rows": ROWS, "model": str(model)}
    backbone = {"text_width": tiny_t5.WIDTH}
    return config_file(tiny.experiment(text=text, backbone=backbone, data={"action_dataset": str(data)}))


@pytest.fixture
def precompute(launch, experiment_file, tmp_path):
    """Runs the command with `--config.text.cache=tmp_path/cache`; returns what it printed, or its message where it failed."""
    return lambda *arguments: launch(
        "precompute_text", f"--config={experiment_file}", f"--config.text.cache={tmp_path / 'cache'}", *arguments
    )


def prompts_in(cache):
    found = []
    for path in cache.glob("*/*.npz"):
        with np.load(path) as entry:
            found.append(entry["prompt"].item())
    return sorted(found)


def test_instructions_of_every_split_and_lines_of_a_file(precompute, model, tmp_path):
    lines = ["pick up the carrot", "", "  put the pot left ", "pick up the carrot", "hebe das\u2028Möhrchen auf"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    output = precompute(f"--prompts={tmp_path / 'prompts.txt'}", "--batch_size=2")
    assert re.search(r"5 prompts: 0 are in .*cache, 5 to embed\n", output) and "embedded 5 prompts in" in output
    prompts = ["do task 0", "do task 1", "hebe das\u2028Möhrchen auf", "pick up the carrot", "put the pot left"]
    assert prompts_in(tmp_path / "cache") == prompts
    config = {"kind": "t5", "rows": ROWS}
    cached = make_text_encoder(TextConfig(**config, model="elsewhere/model", cache=str(tmp_path / "cache")), tiny_t5.WIDTH)
    encode = make_text_encoder(TextConfig(**config, model=str(model)), tiny_t5.WIDTH)
    for prompt in prompts:
        np.testing.assert_allclose(cached(prompt), encode(prompt), atol=1e-5)


def test_a_split_that_is_only_validated_on(precompute, tmp_path):
    splits = {"train": [tiny.episode(15, 0)], "val": [tiny.episode(15, 1)]}
    data = write_rlds(tmp_path, "other", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")
    precompute(f"--config.data.video_dataset={data}", "--config.data.action_dataset=")
    assert prompts_in(tmp_path / "cache") == ["do task 0", "do task 1"]


def test_a_mixture(precompute, tmp_path):
    one, two = (
        write_rlds(
            tmp_path, name, {"train": [tiny.episode(15, seed)]}, control_hz=10.0, image_size=tiny.SIZE, description="Noise."
        )
        for seed, name in enumerate(("one", "two"))
    )
    precompute(f"--config.data.action_dataset={one},{two}*2")
    assert prompts_in(tmp_path / "cache") == ["do task 0", "do task 1"]


def test_it_continues_where_it_was_interrupted(precompute, tmp_path):
    precompute()
    first, second = sorted((tmp_path / "cache").glob("*/*.npz"))
    second.unlink()
    kept = first.stat().st_mtime_ns
    assert re.search(r"2 prompts: 1 are in .*cache, 1 to embed\n", precompute())
    assert first.stat().st_mtime_ns == kept and second.exists()


def test_no_model_is_needed_where_nothing_is_missing(precompute, tmp_path, monkeypatch):
    precompute()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "embedded 0 prompts" in precompute("--config.text.model=elsewhere/model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.text.cache="], r"'text\.cache' is empty"),
        (["--config.text.kind=hash"], r"'text\.kind' is 'hash'; expected 't5'"),
        (["--config.data.action_dataset="], r"nothing to embed.*--prompts"),
        (["--prompts=nowhere.txt"], r"--prompts=nowhere\.txt cannot be read"),
        (
            ["--config.data.action_dataset=nowhere"],
            "names 'nowhere': there is no such folder, and no dataset of that name is registered",
        ),
        (["--config.data.train_split=training"], "no split 'training'"),
        (["--config.text.model=elsewhere/model"], r"'text\.model' is 'elsewhere/model', which is not on this machine"),
        (["--device=abacus"], "cannot be loaded on 'abacus'"),
    ],
)
def test_the_message_names_the_mistake(precompute, tmp_path, arguments, message):
    assert re.search(message, precompute(*arguments))
    assert prompts_in(tmp_path / "cache") == []
