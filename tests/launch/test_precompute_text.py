"""launch/precompute_text.py as a user runs it, and what its mistakes say."""

import pathlib
import re
import runpy
import sys

import numpy as np
import pytest
import tiny
import tiny_t5
from absl import flags

from data_pipelines.writers import write_rlds
from mimic_video.config import TextConfig, to_dict
from mimic_video.models.text import make_text_encoder

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
ROWS = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of the T5 `model`, of datasets with "do task 0" and "do task 1" in the split train and "do task 0" in val, and of
    the experiment `config.py`."""
    folder = tmp_path_factory.mktemp("place")
    tiny_t5.save(folder / "model")
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)], "val": [tiny.episode(15, 2)]}
    data = write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")
    text = {"kind": "t5", "rows": ROWS, "width": tiny_t5.WIDTH, "model": str(folder / "model")}
    values = to_dict(tiny.experiment(text=text, backbone={"text_width": tiny_t5.WIDTH}, data={"action_dataset": str(data)}))
    (folder / "config.py").write_text(f"import ml_collections\n\ndef get_config():\n"
                                      f"    return ml_collections.ConfigDict({values!r})\n")  # fmt: skip
    return folder


@pytest.fixture
def precompute(monkeypatch, place, tmp_path, capfd):
    """Runs the command with `--config.text.cache=tmp_path/cache`; returns what it printed, or its message where it failed."""

    def run(*arguments):
        before = set(flags.FLAGS)
        own = [f"--config={place / 'config.py'}", f"--config.text.cache={tmp_path / 'cache'}"]
        monkeypatch.setattr(sys, "argv", ["launch/precompute_text.py", *own, *arguments])
        monkeypatch.syspath_prepend(str(LAUNCH))
        monkeypatch.delitem(sys.modules, "experiment", raising=False)
        try:
            with pytest.raises(SystemExit) as exit:
                runpy.run_path(str(LAUNCH / "precompute_text.py"), run_name="__main__")
        finally:
            for name in set(flags.FLAGS) - before:
                if name in ("prompts", "batch", "device") or name.startswith("config"):
                    delattr(flags.FLAGS, name)
        output = capfd.readouterr()
        if exit.value.code in (None, 0):
            return output.out
        assert exit.value.code.startswith("error: ") and "Traceback" not in output.err
        return exit.value.code

    return run


def prompts_in(cache):
    found = []
    for path in cache.glob("*/*.npz"):
        with np.load(path) as entry:
            found.append(entry["prompt"].item())
    return sorted(found)


def test_instructions_of_every_split_and_lines_of_a_file(precompute, place, tmp_path):
    lines = ["pick up the carrot", "", "  put the pot left ", "pick up the carrot", "hebe das Möhrchen auf"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    output = precompute(f"--prompts={tmp_path / 'prompts.txt'}", "--batch=2")
    assert re.search(r"5 prompts: 0 are in .*cache, 5 to embed\n", output) and "embedded 5 prompts in" in output
    prompts = ["do task 0", "do task 1", "hebe das Möhrchen auf", "pick up the carrot", "put the pot left"]
    assert prompts_in(tmp_path / "cache") == prompts
    config = {"kind": "t5", "rows": ROWS, "width": tiny_t5.WIDTH}
    cached = make_text_encoder(TextConfig(**config, model="elsewhere/model", cache=str(tmp_path / "cache")))
    encode = make_text_encoder(TextConfig(**config, model=str(place / "model")))
    for prompt in prompts:
        np.testing.assert_allclose(cached(prompt), encode(prompt), atol=1e-5)


def test_a_split_that_is_only_validated_on(precompute, tmp_path, place):
    splits = {"train": [tiny.episode(15, 0)], "val": [tiny.episode(15, 1)]}
    data = write_rlds(tmp_path, "other", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")
    precompute(f"--config.data.video_dataset={data}", "--config.data.action_dataset=")
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


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config.text.cache="], r"'text\.cache' is empty"),
    (["--config.text.kind=hash"], r"'text\.kind' is 'hash'; expected 't5'"),
    (["--config.data.action_dataset="], r"nothing to embed.*--prompts"),
    (["--prompts=nowhere.txt"], r"--prompts=nowhere\.txt cannot be read"),
    (["--config.data.action_dataset=nowhere"], "dataset directory nowhere does not exist"),
    (["--config.data.train_split=training"], "no split 'training'"),
    (["--config.text.model=elsewhere/model"], r"'text\.model' is 'elsewhere/model', which is not on this machine"),
    (["--device=abacus"], "cannot be loaded on 'abacus'"),
])  # fmt: skip
def test_the_message_names_the_mistake(precompute, tmp_path, arguments, message):
    assert re.search(message, precompute(*arguments))
    assert prompts_in(tmp_path / "cache") == []
