"""Policies on the Hugging Face Hub: the real client beside a stand-in for the Hub (tests/fake_hub.py)."""

import json
import os
import pathlib
import re
import sys

import fake_hub
import jax
import numpy as np
import pytest
import tiny
import yaml

from mimic_video.config import ConfigError
from mimic_video.embodiments import Embodiment
from mimic_video.models.text import make_text_encoder
from mimic_video.policy import hub
from mimic_video.policy.bundle import BundleError, new_bundle, write_policy
from mimic_video.policy.policy import Policy
from mimic_video.runs.storage import RunError
from mimic_video.transforms import compute_statistics

CONFIG = tiny.experiment(backbone={"num_blocks": 1}, decoder={"num_blocks": 1}, data={"action_dataset": "/home/somebody/drawers"})
STATISTICS = {
    "action": compute_statistics(np.random.default_rng(0).normal(0, 1, (50, 4, 2))),
    "proprio": compute_statistics(np.random.default_rng(1).normal(0, 1, (50, 1, 3))),
}
ARM = Embodiment("arm", 0, STATISTICS, {"action": (), "proprio": ()}, datasets=("drawers",))
LIFT = Embodiment("lift", 1, STATISTICS, {"action": (), "proprio": ()})
IMAGES = np.random.default_rng(2).integers(0, 256, (1, 1, 5, *tiny.SIZE, 3), np.uint8)
OBSERVATION = IMAGES, np.array([[0.5, 1.5, -1.0]], np.float32), ["open it"]
EVALUATION = {
    "success": {"drawer-open": {"episodes": 20, "successes": 13, "rate": 0.65, "low": 0.43, "high": 0.82}},
    "open_loop": {"rmse": 0.31234, "first_step_rmse": 0.2, "windows": 44},
    "evaluation": {"simulator": "metaworld"},
}


# Names and cards, which need no client.


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("hf://me/arm", ("me/arm", None)),
        ("hf://me/arm-1.2_b@v1.0", ("me/arm-1.2_b", "v1.0")),
        ("hf://me/arm@refs/pr/3", ("me/arm", "refs/pr/3")),
    ],
)
def test_names_on_the_hub(url, place):
    assert hub.is_on_hub(url) and hub.parse(url) == place


@pytest.mark.parametrize("url", ["hf://arm", "hf://me/arm@", "hf://me/arm/bundle", "hf://", "hf://../arm", "hf://me/a b"])
def test_other_names_are_refused(url):
    with pytest.raises(ConfigError, match=f"{re.escape(repr(url))}; expected hf://USER/NAME or hf://USER/NAME@REVISION"):
        Policy.load(url)
    with pytest.raises(ConfigError, match="is no repository of the Hub; expected USER/NAME"):
        hub.reserve("arm", private=False)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: Policy.load("hf://me/arm"), lambda: hub.reserve("me/arm", False)):
        with pytest.raises(ConfigError, match=r"pip install 'mimic-video-jax\[hub\]'"):
            call()


def test_the_card_has_what_a_reader_asks_for_and_no_paths_of_the_machine():
    card = hub.model_card("me/arm", CONFIG, {"arm": ARM}, 400, "apache-2.0", EVALUATION)
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "apache-2.0",
        "library_name": "mimic-video-jax",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "jax", "video-action-model"],
    }
    for part in (
        "# arm\n",
        'Policy.load("hf://me/arm")\n',
        "| `arm` | `drawers` | primary | 3 | 2 |",
        f"5 past and 4 future frames of {tiny.SIZE[0]}x{tiny.SIZE[1]} at 10 Hz",
        "| Trained for | 400 steps",
        "| drawer-open | 13 of 20 | 65.0% | 43.0% to 82.0% |",
        "in metaworld",
        "| of all actions of a chunk | 0.3123 |",
        "44 held-out windows",
    ):
        assert part in text, part
    assert "/home" not in card


def test_a_card_without_results_or_licence_of_two_robots():
    card = hub.model_card("me/two", CONFIG, {"arm": ARM, "lift": LIFT}, 1)
    assert "Results" not in card and "license" not in card
    assert 'Policy.load("hf://me/two", embodiment="arm")' in card and "--embodiment=arm" in card
    assert "| `lift` | its own | primary | 3 | 2 |" in card


def test_results_of_a_run(tmp_path):
    assert hub.read_evaluation(tmp_path) is None
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert hub.read_evaluation(tmp_path) == EVALUATION
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match=r"evaluation\.json is damaged: .*; run launch/evaluate\.py again, or remove it"):
        hub.read_evaluation(tmp_path)


# Pushing and fetching.


@pytest.fixture(scope="module")
def params():
    return jax.device_put(tiny.params(CONFIG))


def write(folder, params, step=7, text="open it"):
    rows = make_text_encoder(CONFIG.text, CONFIG.backbone.text_width)(text)
    with new_bundle(folder, step) as partial:
        write_policy(partial, CONFIG, params, {"arm": ARM}, {text: rows})
    return folder


def at(url, monkeypatch):
    """Sets anew what the client read of HF_ENDPOINT when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub of its own with a cache of its own."""
    from huggingface_hub import constants

    with fake_hub.running() as running:
        at(running.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield running


@pytest.fixture
def pushed(server, params, tmp_path):
    """(bundle, its commit) of `hf://me/arm`, which is private."""
    bundle = write(tmp_path / "bundle", params)
    hub.reserve("me/arm", private=True)
    return bundle, hub.push(bundle, "me/arm", license="other", evaluation=EVALUATION)


@pytest.mark.reference
def test_what_is_fetched_plans_as_what_was_pushed(pushed, server):
    bundle, commit = pushed
    expected = Policy.load(bundle)(*OBSERVATION)
    assert expected.std() > 0
    for url in ("hf://me/arm", f"hf://me/arm@{commit}", "hf://me/arm@main"):
        np.testing.assert_array_equal(Policy.load(url)(*OBSERVATION), expected)
    repository = server.repositories["me/arm"]
    assert repository["private"] and len(repository["commits"]) == 2  # one for everything
    _, files = repository["commits"][-1]
    assert b"license: other" in files["README.md"] and b"13 of 20" in files["README.md"]
    assert {name for name in files if name.startswith("bundle/")} == {
        f"bundle/{path.relative_to(bundle)}" for path in bundle.rglob("*") if path.is_file()
    }
    assert any(len(content) > fake_hub.LARGE for content in files.values()) and server.objects


@pytest.mark.reference
def test_files_that_are_there_are_not_fetched_again_and_no_network_is_needed(pushed, server, monkeypatch):
    expected = Policy.load("hf://me/arm")(*OBSERVATION)
    server.requests.clear()
    Policy.load("hf://me/arm")
    assert not [path for _, path in server.requests if "/resolve/" in path or "/lfs/" in path]
    at("http://127.0.0.1:9", monkeypatch)  # where nothing listens
    np.testing.assert_array_equal(Policy.load("hf://me/arm")(*OBSERVATION), expected)
    with pytest.raises(RunError, match=r"hf://me/other cannot be read: (?s:.*)[Cc]onnection"):
        Policy.load("hf://me/other")


@pytest.mark.reference
def test_a_newer_bundle_takes_the_place_of_the_older_one_whose_revision_stays(pushed, server, params, tmp_path):
    bundle, first = pushed
    old = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    second = write(tmp_path / "second", params, step=9, text="close it")
    hub.reserve("me/arm", private=False)  # it is there, and stays private
    hub.push(second, "me/arm")
    assert server.repositories["me/arm"]["private"]
    newest, former = hub.fetch("hf://me/arm"), hub.fetch(f"hf://me/arm@{first}")
    assert json.loads((newest / "manifest.json").read_text())["step"] == 9
    assert json.loads((former / "manifest.json").read_text())["step"] == 7
    names = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(second)) for path in second.rglob("*") if path.is_file()} and old - names


@pytest.mark.reference
def test_a_damaged_file_is_named_and_how_to_get_another(pushed, server):
    _, files = server.repositories["me/arm"]["commits"][-1]
    name = max((name for name in files if name.startswith("bundle/params/")), key=lambda name: len(files[name]))
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with pytest.raises(BundleError) as error:
        Policy.load("hf://me/arm")
    message, place = str(error.value), name.removeprefix("bundle/")
    assert message.startswith("hf://me/arm: the bundle ") and f"{place} is not what was written" in message
    kept = pathlib.Path(re.search(r"stays in (.*): delete that folder", message)[1])
    assert kept.name == "models--me--arm" and (kept / "snapshots").is_dir()


@pytest.mark.reference
def test_what_the_hub_refuses(pushed, server, monkeypatch, tmp_path):
    bundle, _ = pushed
    with pytest.raises(RunError, match="hf://me/arm@v2: the Hub has no such revision"):
        Policy.load("hf://me/arm@v2")
    with pytest.raises(RunError, match=r"hf://me/nothing: the Hub has no such repository, or it is private.*HF_TOKEN"):
        Policy.load("hf://me/nothing")
    hub.reserve("me/empty", private=False)
    with pytest.raises(RunError, match="hf://me/empty has no folder bundle/"):
        Policy.load("hf://me/empty")
    for token, status in (("hf_yours", 403), ("hf_wrong", 401)):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(RunError, match=f"me/other cannot be written: the Hub answers {status}; it needs a token in HF_TOKEN"):
            hub.reserve("me/other", private=False)
    with pytest.raises(RunError, match="hf://me/arm cannot be read: the Hub answers 401; it needs a token in HF_TOKEN"):
        Policy.load("hf://me/arm")
    monkeypatch.setenv("HF_TOKEN", "hf_yours")
    with pytest.raises(RunError, match="hf://me/arm: the Hub has no such repository, or it is private"):
        Policy.load("hf://me/arm")
    with pytest.raises(RunError, match="me/empty cannot be written: the Hub answers 403"):
        hub.push(bundle, "me/empty")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="me/mine cannot be written: the Hub answers 401"):
        hub.reserve("me/mine", private=False)
    assert not os.path.exists(tmp_path / "cache" / "models--me--arm" / "snapshots")
