import json

import chex
import jax
import numpy as np
import pytest
import tiny

from mimic_video.config import ConfigError
from mimic_video.embodiments import Embodiment
from mimic_video.models.text import make_text_encoder
from mimic_video.policy.bundle import VERSION, BundleError, new_bundle, read_bundle, write_policy
from mimic_video.policy.policy import Policy
from mimic_video.runs.storage import RunError
from mimic_video.transforms import compute_statistics

CONFIG = tiny.experiment(backbone={"num_blocks": 1}, decoder={"num_blocks": 1})
STATISTICS = {
    "action": compute_statistics(np.random.default_rng(0).normal(0, 1, (50, 4, 2))),
    "proprio": compute_statistics(np.random.default_rng(1).normal(0, 1, (50, 1, 3))),
}
ROBOTS = {
    name: Embodiment(name, index, STATISTICS, {"action": (1,), "proprio": ()}) for index, name in enumerate(("arm", "lift"))
}


@pytest.fixture(scope="module")
def params():
    return jax.device_put(tiny.params(CONFIG))


@pytest.fixture
def bundle(tmp_path, params):
    text = {"open it": make_text_encoder(CONFIG.text, CONFIG.backbone.text_width)("open it"), "...": np.zeros((4, 8), np.float32)}
    with new_bundle(tmp_path / "bundle", step=7) as folder:
        write_policy(folder, CONFIG, params, ROBOTS, text)
    return tmp_path / "bundle"


def test_what_is_read_is_what_was_written(bundle, params):
    read = read_bundle(bundle)
    assert read.config == CONFIG
    chex.assert_trees_all_equal(read.params, params)
    assert list(read.embodiments) == ["arm", "lift"] and read.embodiments["lift"].raw_dims["action"] == (1,)
    np.testing.assert_array_equal(read.embodiments["arm"].statistics["action"].mean, STATISTICS["action"].mean)
    assert json.loads((bundle / "manifest.json").read_text())["step"] == 7
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_known_instructions_need_no_encoder(bundle):
    """Nor a model that is not there, which others do."""
    config = json.loads((bundle / "config.json").read_text())
    config["text"] |= {"kind": "t5", "model": "no/such-model"}
    with new_bundle(bundle.parent / "t5", step=0) as folder:
        read = read_bundle(bundle)
        t5 = tiny.experiment(text=config["text"], backbone={"num_blocks": 1}, decoder={"num_blocks": 1})
        write_policy(folder, t5, read.params, ROBOTS, {name: read.encode_text(name) for name in ("open it", "...")})
    encode = read_bundle(bundle.parent / "t5").encode_text
    np.testing.assert_array_equal(encode("open it"), make_text_encoder(CONFIG.text, CONFIG.backbone.text_width)("open it"))
    assert encode("").shape == encode("...").shape == (4, 8)  # no words; no instruction, to compile with
    with pytest.raises(ConfigError, match=r"'close it' is not one that the bundle has features of .* no encoder"):
        encode("close it")


def change(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def manifest(bundle, **changes):
    file = bundle / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda bundle: change(bundle / "embodiments.json"), r"embodiments.json is not what was written"),
        (
            lambda bundle: change(max((bundle / "params").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)),
            r"params/.* is not what was written",
        ),
        (lambda bundle: (bundle / "config.json").unlink(), r"config.json is missing"),
        (lambda bundle: (bundle / "text" / "more.npz").write_bytes(b""), r"text/more.npz is not one of its files"),
        (lambda bundle: (bundle / "manifest.json").unlink(), r"has no manifest.json: it is not a complete bundle"),
        (lambda bundle: (bundle / "manifest.json").write_text('{"format"'), r"manifest.json is damaged"),
        (lambda bundle: manifest(bundle, files=None), r"manifest.json is damaged: it has no list of files"),
        (
            lambda bundle: manifest(bundle, version=VERSION + 1),
            r"version 2; this version of mimic_video reads .* up to version 1",
        ),
        (lambda bundle: manifest(bundle, format="another"), r"format 'another'"),
    ],
)
def test_what_is_no_whole_bundle_is_refused(bundle, damage, complaint):
    damage(bundle)
    with pytest.raises(BundleError, match=complaint):
        Policy.load(bundle)


def test_an_interrupted_export_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_bundle(tmp_path / "bundle", step=0) as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="is not a run directory"):
        Policy.load(tmp_path / "bundle")


def test_a_bundle_replaces_nothing(bundle):
    with pytest.raises(BundleError, match="bundle exists"), new_bundle(bundle, step=0):
        pass
    with pytest.raises(ConfigError, match="the embodiment is None; this model has 'arm', 'lift'"):
        Policy.load(bundle)
