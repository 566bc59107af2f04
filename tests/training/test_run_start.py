"""What a run starts from, as far as it needs no other run; tests of commands start from those."""

import chex
import numpy as np
import pytest
import tiny

from mimic_video.config import ConfigError
from mimic_video.runs import checkpoints, directory
from mimic_video.training import start

CONFIG = tiny.experiment()


def test_a_run_keeps_the_robots_that_it_was_trained_with(tmp_path, monkeypatch):
    computed = tiny.Data(CONFIG).robots()
    for _ in range(2):  # computed anew until there is a checkpoint
        (tmp_path / "embodiments.json").unlink(missing_ok=True)
        found = start.find_robots(tmp_path, lambda: computed)
        assert list(found) == ["tiny"] and list(directory.load_embodiments(tmp_path)) == ["tiny"]
    monkeypatch.setattr(start.checkpoints, "has_checkpoint", lambda run: True)

    def again():
        pytest.fail("statistics are computed again")

    chex.assert_trees_all_equal(
        vars(start.find_robots(tmp_path, again)["tiny"].statistics["action"]), vars(found["tiny"].statistics["action"])
    )


def test_a_tokenizer_is_fitted_to_the_cameras_that_windows_have():
    frames = tiny.batch(CONFIG, 6).observation.video
    alone = start.fit_tokenizer(CONFIG, [{"video": video} for video in frames])
    both = tiny.experiment(data={"cameras": ("primary", "wrist")})
    black = np.zeros_like(frames[0])
    pairs = [(frames[0], frames[1]), (frames[2], black), (frames[3], frames[4]), (frames[5], black)]
    samples = [{"video": np.concatenate(pair), "view_mask": np.array([True, pair[1] is not black])} for pair in pairs]
    chex.assert_trees_all_equal(start.fit_tokenizer(both, samples), alone)


def test_a_tokenizer_that_is_not_fitted_comes_from_a_run(tmp_path):
    with pytest.raises(ConfigError, match="'backbone_run' is empty; expected a run with the weights of the tokenizer 'wan'"):
        start.require_backbone(tiny.experiment(tokenizer={"kind": "wan"}), tmp_path)
    start.require_backbone(CONFIG, tmp_path)


def test_until_there_is_a_checkpoint_the_tokenizer_is_that_of_the_backbone_run_that_is_named_now(tmp_path):
    video = tiny.experiment(stage="video")
    params = {
        name: {part: tiny.params(video, seed)[part] for part in ("tokenizer", "backbone")} for seed, name in enumerate("ab")
    }
    for name, weights in params.items():
        checkpoints.save_converted(tmp_path / name, video, weights)
    run, named = tmp_path / "run", {name: tiny.experiment(backbone_run=str(tmp_path / name)) for name in params}
    directory.write_config(run, named["a"])
    checkpoints.save_frozen(run, params["a"])  # a start that ended before its first checkpoint
    chex.assert_trees_all_equal(start.read_tokenizer(named["b"], run), params["b"]["tokenizer"])
    checkpoints.save_converted(tmp_path / "started", named["a"], params["a"] | {"decoder": {}}, tiny.Data(CONFIG).robots())
    chex.assert_trees_all_equal(start.read_tokenizer(named["b"], tmp_path / "started"), params["a"]["tokenizer"])
