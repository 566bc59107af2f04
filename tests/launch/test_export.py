"""A run exported by the launch script; what bundles refuse is in tests/policy/test_bundle.py."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import fake_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from documented import commands

from mimic_video.embodiments import Embodiment
from mimic_video.models.text import make_text_encoder
from mimic_video.policy.policy import Policy
from mimic_video.runs import checkpoints, directory
from mimic_video.stages import split_params
from mimic_video.training.steps import make_state
from mimic_video.transforms import compute_statistics

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = tiny.experiment(backbone={"num_blocks": 1}, decoder={"num_blocks": 1}, lora={"rank": 2})
ROBOT = Embodiment(
    "arm",
    0,
    {
        "action": compute_statistics(np.random.default_rng(0).normal([5, -3], [0.1, 2.0], (200, 4, 2))),
        "proprio": compute_statistics(np.random.default_rng(1).normal(1.0, 2.0, (200, 1, 3))),
    },
    {"action": (), "proprio": ()},
)
IMAGES = np.random.default_rng(2).integers(0, 256, (1, 1, 5, *tiny.SIZE, 3), np.uint8)
PROPRIO, INSTRUCTION = np.array([[0.5, 1.5, -1.0]], np.float32), "open the drawer"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With adapters that matter, and a moving average that is not what was trained last."""
    folder = tmp_path_factory.mktemp("export") / "run"
    directory.write_config(folder, CONFIG)
    trained, frozen = split_params(tiny.params(CONFIG), CONFIG)
    random = np.random.default_rng(3)
    trained = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.05 * random.standard_normal(leaf.shape, np.float32), trained)
    checkpoints.save_frozen(folder, frozen)
    state = make_state(CONFIG, jax.tree.map(np.zeros_like, trained)).replace(step=np.int32(4), ema=trained)
    with checkpoints.open_checkpoints(folder, 1) as manager:
        checkpoints.save(manager, jax.device_put(state), data={})
    directory.save_embodiments(folder, {"arm": ROBOT})
    return folder


# Nothing of the package may be imported here, nor what trains or reads data there.
STABLEHLO = """
import sys
import jax, numpy as np
from jax import export
folder, data = sys.argv[1:]
program = export.deserialize(bytearray(open(f"{folder}/stablehlo/cpu.bin", "rb").read()))
weights = jax.device_put(dict(np.load(f"{folder}/stablehlo/weights.npz")))
inputs = np.load(data)
plan = jax.jit(program.call)
np.save(f"{data}.actions.npy", plan(weights, *(inputs[name] for name in ("images", "proprio", "text", "key"))))
assert not [name for name in sys.modules if name.split(".")[0] in ("mimic_video", "flax", "orbax")]
"""
# The package itself, without what is not on a robot's machine.
IN_PROCESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "grain", "ml_collections", "data_pipelines", "torch"):
            raise ModuleNotFoundError(f"{name} is not on this machine")

sys.meta_path.insert(0, Blocked())
import numpy as np
from mimic_video.policy.policy import Policy
folder, data = sys.argv[1:]
inputs = np.load(data)
np.save(f"{data}.actions.npy", Policy.load(folder)(inputs["images"], inputs["proprio"], [str(inputs["instruction"])]))
"""


def in_fresh_process(script, bundle, inputs, path):
    """Actions that a Python process without this one's memory computes."""
    np.savez(path, **inputs)
    environment = os.environ | {"PYTHONPATH": str(ROOT) if script is IN_PROCESS else ""}
    subprocess.run([sys.executable, "-c", script, bundle, path], check=True, env=environment, cwd=path.parent)
    return np.load(f"{path}.actions.npy")


@pytest.fixture(scope="module")
def inputs():
    """Of the first plan of a policy whose seed is 0."""
    key = jax.random.fold_in(jax.random.key(0), 0)
    return {
        "images": IMAGES,
        "proprio": PROPRIO,
        "text": make_text_encoder(CONFIG.text, CONFIG.backbone.text_width)(INSTRUCTION)[None],
        "key": np.asarray(jax.random.key_data(key)),
        "instruction": INSTRUCTION,
    }


@pytest.mark.training
def test_an_exported_policy_plans_as_the_run_does(launch, run, inputs, tmp_path):
    """To the bit: after reading the bundle in a fresh process, and by the StableHLO program alone."""
    (tmp_path / "prompts.txt").write_text(f"{INSTRUCTION}\n\nclose it\n")
    said = launch(
        "export",
        f"--workdir={run}",
        f"--out={tmp_path / 'bundle'}",
        "--stablehlo=cpu,cuda,tpu",
        "--safetensors",
        f"--prompts={tmp_path / 'prompts.txt'}",
    )
    assert f"wrote {tmp_path / 'bundle'}: step 4 of {run}, float32, 2 known instructions" in said
    expected = Policy.load(run)(IMAGES, PROPRIO, [INSTRUCTION])
    assert np.abs(expected - [5, -3]).max() < 20 and expected.std() > 0
    for script in (IN_PROCESS, STABLEHLO):
        actions = in_fresh_process(script, tmp_path / "bundle", inputs, tmp_path / "inputs.npz")
        np.testing.assert_array_equal(actions, expected)
    files = {str(file.relative_to(tmp_path / "bundle")) for file in (tmp_path / "bundle").rglob("*") if file.is_file()}
    assert {f"stablehlo/{name}" for name in ("cpu.bin", "cuda.bin", "tpu.bin", "weights.npz", "signature.json")} < files
    signature = json.loads((tmp_path / "bundle" / "stablehlo" / "signature.json").read_text())
    assert signature["inputs"]["images"] == {"shape": list(IMAGES.shape), "dtype": "uint8"}
    stored = safetensors.numpy.load_file(tmp_path / "bundle" / "safetensors" / "action_decoder" / "policy.safetensors")
    merged = checkpoints.load_params(run)[0]["decoder"]["final_proj"]["kernel"]
    np.testing.assert_array_equal(stored["net.final_layer.linear.weight"], np.asarray(merged).T)


@pytest.mark.training
def test_bfloat16_is_as_near_as_its_rounding(launch, run, tmp_path):
    """Of a policy with random weights in units of the actions' deviations; bfloat16 has eight bits."""
    launch("export", f"--workdir={run}", f"--out={tmp_path / 'bundle'}", "--precision=bfloat16")
    policy, exact = Policy.load(tmp_path / "bundle"), Policy.load(run)
    assert policy.config.precision == "bfloat16" and policy.params["backbone"]["patch_proj"]["kernel"].dtype == jnp.bfloat16
    difference = policy(IMAGES, PROPRIO, [INSTRUCTION]) - exact(IMAGES, PROPRIO, [INSTRUCTION])
    assert 0 < np.abs(difference / ROBOT.statistics["action"].std_clamped).max() < 0.05


@pytest.mark.training
def test_weights_of_eight_bits(launch, run, inputs, tmp_path):
    """The bundle and its program are to the bit what a run makes of its weights if configured so, and near the exact policy."""
    launch("export", f"--workdir={run}", f"--out={tmp_path / 'bundle'}", "--weights=int8", "--stablehlo=cpu")
    config = dataclasses.replace(CONFIG, policy=dataclasses.replace(CONFIG.policy, weights="int8"))
    expected, exact = Policy.load(run, config)(IMAGES, PROPRIO, [INSTRUCTION]), Policy.load(run)(IMAGES, PROPRIO, [INSTRUCTION])
    for script in (IN_PROCESS, STABLEHLO):
        actions = in_fresh_process(script, tmp_path / "bundle", inputs, tmp_path / "inputs.npz")
        np.testing.assert_array_equal(actions, expected)
    assert 0 < np.abs((expected - exact) / ROBOT.statistics["action"].std_clamped).max() < 0.05


def test_what_cannot_be_exported(launch, run, tmp_path, monkeypatch):
    out = f"--out={tmp_path / 'bundle'}"
    assert "is not a run directory" in launch("export", f"--workdir={tmp_path}", out)
    assert "has gpu; expected" in launch("export", f"--workdir={run}", out, "--stablehlo=gpu")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flatbuffers", None)
        assert "pip install 'mimic-video-jax[stablehlo]'" in launch("export", f"--workdir={run}", out, "--stablehlo=cpu")
    (tmp_path / "prompts.txt").write_text("one two three four five\n")
    assert "has 5 words; text.rows is 4" in launch("export", f"--workdir={run}", out, f"--prompts={tmp_path / 'prompts.txt'}")
    assert f"--prompts={tmp_path} cannot be read" in launch("export", f"--workdir={run}", out, f"--prompts={tmp_path}")
    (tmp_path / "bundle").write_text("")
    assert "bundle exists" in launch("export", f"--workdir={run}", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "prompts.txt"]  # nothing half-written is left


@pytest.mark.processes
def test_the_commands_of_the_document_share_a_policy(run, inputs, tmp_path):
    """By the environment alone, as users would: in processes of their own, beside a stand-in for the Hub."""
    (pushing,), (serving,) = (
        [
            command
            for command in commands("docs/sharing.md", "run by tests/launch/test_export.py")
            if f"launch/{name}.py" in command
        ]
        for name in ("export", "serve")
    )
    pushing = pushing.replace("runs/quickstart/action", str(run)).replace("policies/drawers", str(tmp_path / "drawers"))
    url = serving.partition("--policy=")[2]
    with fake_hub.running() as hub:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1"}
        (run / "evaluation.json").write_text(json.dumps({"open_loop": {"rmse": 0.25, "windows": 3}}))
        exported = subprocess.run(
            [sys.executable, *pushing.split()[1:]], check=True, env=environment, cwd=ROOT, capture_output=True, text=True
        )
        repository = hub.repositories["me/drawers"]
        commit, files = repository["commits"][-1]
        assert f"pushed it to hf://me/drawers@{commit}" in exported.stdout and repository["private"]
        assert b"license: other" in files["README.md"] and b"| of all actions of a chunk | 0.25 |" in files["README.md"]
        np.savez(tmp_path / "inputs.npz", **inputs)
        subprocess.run(
            [sys.executable, "-c", IN_PROCESS, url, tmp_path / "inputs.npz"], check=True, env=environment, cwd=tmp_path
        )
    np.testing.assert_array_equal(np.load(tmp_path / "inputs.npz.actions.npy"), Policy.load(run)(IMAGES, PROPRIO, [INSTRUCTION]))


def test_what_cannot_be_pushed(launch, run, tmp_path, monkeypatch):
    """Before anything is written."""
    arguments = f"--workdir={run}", f"--out={tmp_path / 'bundle'}"
    assert "--push_to_hub=drawers is no repository of the Hub; expected USER/NAME" in launch(
        "export", *arguments, "--push_to_hub=drawers"
    )
    assert "expected --push_to_hub=USER/NAME too" in launch("export", *arguments, "--private")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'mimic-video-jax[hub]'" in launch("export", *arguments, "--push_to_hub=me/drawers")
    assert list(tmp_path.iterdir()) == []
